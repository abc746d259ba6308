"""colotx: non-stop virtual machines. See docs/architecture.md for the picture."""
