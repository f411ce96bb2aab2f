"""A report as one HTML file: what is on it (`page`), and how it is written (`render`).

A page holds data only. Whatever comes from outside, such as a client's name or a model's answer, is
escaped where it is written, and nothing else in the package writes HTML.
"""
