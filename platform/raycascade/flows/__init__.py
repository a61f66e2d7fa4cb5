"""The verbs: prepare, train, index, evaluate, score. The only package code that imports Ray."""
