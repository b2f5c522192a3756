"""Reports: frozen data shown in a terminal, as Markdown, as JSON or as one HTML page.

Nothing here computes: who measured puts the numbers into a `Report`, this folder shows them.
"""
