"""How good the answers are, and how well certainty follows the order."""
