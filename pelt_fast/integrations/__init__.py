"""Other libraries' objects made to work with ours: PEFT models, transformers' Trainer."""
