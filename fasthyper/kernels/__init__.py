"""The Triton kernels: the formula of each stands at the top of its file.

    fold.py         y, and dx or dz alone: x ⊗ z folded into the K dimension of one product
    dx_dz.py        dx and dz from one pass over G = g·H
    weight_grad.py  dH
    reduce.py       the second stage of a split sum
    pad.py          z and H with rows that wide loads can begin at
    loads.py        how tiles of the factors are read
    tiles.py        which tiles each part may take

Nothing here imports more than triton; what launches them is `fasthyper.backends.triton`.
"""
