"""The parts of `scripts.quickstart`, in the order in which it uses them."""
