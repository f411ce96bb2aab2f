"""Builds the embedded demo: its data set, its tokenizer and its pretrained model."""
