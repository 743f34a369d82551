"""The proof on a GPU, in parts of at most eight minutes: ``make gpu`` lists them."""
