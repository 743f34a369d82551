"""Models and trainers of other libraries with our ops: PEFT models, transformers' Trainer."""
