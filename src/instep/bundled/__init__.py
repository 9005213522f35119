"""The miniature worlds that ship with the package: weights, grammar, classifiers, prompts and their evaluation. It may import every room below the
command line except the laboratory and human evaluation; no other room names a bundled model.
"""
