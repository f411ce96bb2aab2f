"""One module per algorithm: rules, written in the symbols of their papers."""
