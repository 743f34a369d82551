"""What the ops share: arguments, dropout, activations, and the choice of what runs."""
