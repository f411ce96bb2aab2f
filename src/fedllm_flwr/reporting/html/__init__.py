"""Reports as single HTML files: their content (`page`), and their rendering (`render`).

A page is plain data. All text, such as a client's name or a model's answer, is escaped by `render`,
and nothing else in the package writes HTML.
"""
