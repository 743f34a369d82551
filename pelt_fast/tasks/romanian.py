"""Romanian as WMT16 papers score it: punctuation, comma letters, no diacritics, then tokens.

Written from the description of the usual pipeline (Moses' normalize-punctuation, the rules named
normalise-romanian and remove-diacritics in the WMT16 scripts, a Moses tokenizer). sacreBLEU's 13a
tokenizer replaces Moses', so scores are close to the pipeline's, not equal.
"""

import re
import unicodedata

_CEDILLA = str.maketrans("ŞşŢţ", "ȘșȚț")  # old encodings have a cedilla instead of the comma
_BARE = str.maketrans("ȘșȚțĂăÂâÎî", "SsTtAaAaIi")
_PUNCTUATION = (
    (re.compile(r"[„“”«»]|''|``"), '"'),
    (re.compile(r"[‚‘’´`]"), "'"),
    (re.compile(r"[–—]"), "-"),
    (re.compile(r"…"), "..."),
    (re.compile(r"[\u00a0\u2009\u202f]"), " "),
    (re.compile(r" +([.,;:!?%)\]])"), r"\1"),
    (re.compile(r"([(\[]) +"), r"\1"),
    (re.compile(r"\s+"), " "),
)


def normalise(text: str) -> str:
    """One sentence, normalised and without diacritics."""
    text = unicodedata.normalize("NFC", text)
    for pattern, plain in _PUNCTUATION:
        text = pattern.sub(plain, text)
    return text.strip().translate(_CEDILLA).translate(_BARE)
