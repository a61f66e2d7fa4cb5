"""Semantic ids: from an item's content vector to codes, and from codes to the tokens of an ordinary `ids` feature.

    content vector -- encoder, residual quantiser (rqvae.py) --> codes -- tokenizers.py --> rows of one table

Models never import this folder: tokens reach them as a feature of the item. Source: Singh et al., "Better
Generalization with Semantic IDs", RecSys 2024.
"""
