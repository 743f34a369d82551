"""The hub: huggingface_hub itself against a server in this process, and its cache."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from huggingface_hub import HfApi

import pelt_fast
from pelt_fast.formats.hub import model_card
from tests.models.judge import assert_near, exactly
from tests.models.test_parity import small_method
from tests.small import inputs, randomise, roberta

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload and a download of small files ask for."""

    def log_message(self, *args):
        pass

    def reply(self, body, **headers) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(200)
        for name, value in {
            "Content-Length": len(data),
            "X-Repo-Commit": COMMIT,
            **headers,
        }.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        files = self.server.files
        if self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            self.reply({"url": f"{self.server.url}/me/method"})
        elif self.path == "/api/validate-yaml":  # the card's front matter
            self.server.card = json.loads(body)["content"]
            self.reply({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            asked = json.loads(body)["files"]
            self.reply({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                                  for f in asked]})  # fmt: skip
        else:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.reply({"commitOid": COMMIT, "commitUrl": f"{self.server.url}/me/method/commit/{COMMIT}",
                        "success": True})  # fmt: skip

    def do_GET(self):
        files = self.server.files
        if "/resolve/" in self.path:
            data = files[self.path.rpartition("/")[2]]
            etag = hashlib.sha1(data).hexdigest()
            self.reply(data, ETag=f'"{etag}"', X_Linked_Size=len(data))
        else:
            self.reply({"id": "me/method", "sha": COMMIT, "private": False, "downloads": 0, "likes": 0,
                        "tags": [], "siblings": [{"rfilename": name} for name in files]})  # fmt: skip

    do_HEAD = do_GET


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.url = {}, f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def injected():
    torch.manual_seed(0)
    model = roberta(dropout=0.0)
    model.config._name_or_path = "FacebookAI/roberta-base"
    return randomise(pelt_fast.inject(model, small_method("mam_glue")))


def test_a_method_goes_up_with_its_card(hub, tmp_path):
    model = injected().eval()
    api = HfApi(endpoint=hub.url, token="hf_of_nobody")
    url = pelt_fast.push_to_hub(model, "me/method", private=True, api=api)
    assert url.endswith(COMMIT)
    assert (hub.created["name"], hub.created["organization"]) == ("method", "me")
    assert hub.files.keys() == {"README.md", "pelt_config.json", "pelt_model.safetensors"}
    assert hub.files["README.md"].decode() == hub.card == model_card(model, "me/method")
    for name, data in hub.files.items():
        (tmp_path / name).write_bytes(data)
    batch = inputs(model)
    logits, exact = model(**batch).logits, exactly(model, batch)["logits"]
    pelt_fast.eject(model)
    assert_near(pelt_fast.load(model, tmp_path).eval()(**batch).logits, logits, exact)


def test_a_method_comes_from_the_hubs_cache(tmp_path, monkeypatch):
    """Laid out as huggingface_hub keeps what it has fetched; no network."""
    model = injected().eval()
    repo = tmp_path / "models--me--method"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMIT)
    pelt_fast.save(model, repo / "snapshots" / COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    batch = inputs(model)
    logits, exact = model(**batch).logits, exactly(model, batch)["logits"]
    pelt_fast.eject(model)
    loaded = pelt_fast.load_from_hub(model, "me/method").eval()
    assert_near(loaded(**batch).logits, logits, exact)


def test_the_card_says_what_it_is():
    model = injected()
    card = model_card(model, "me/method")
    head, _, body = card.removeprefix("---\n").partition("---\n")
    assert "base_model: FacebookAI/roberta-base" in head and "library_name: pelt_fast" in head
    assert "# mam_glue on FacebookAI/roberta-base" in body
    assert "- parallel prefix on heads, gated, size 5" in body
    assert f"{pelt_fast.count_parameters(model).kept:,} numbers are kept" in body
    assert "| prefix | self | 2 |" in body
    assert 'RobertaForSequenceClassification.from_pretrained("FacebookAI/roberta-base")' in body
    with pytest.raises(ValueError, match="nothing is injected"):
        model_card(roberta())
