"""Other libraries' models and trainers at work with ours: PEFT models, transformers' Trainer."""
