"""The algorithms, a page each: rules in the symbols of their papers."""
