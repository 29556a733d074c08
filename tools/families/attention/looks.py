"""The colour and marker of each attention kernel."""

import functools

from tools.drawing import looks

STYLES = {
    "reference": ("#7a7f87", "s"),
    "sdpa_flash": ("#0072b2", "o"),
    "sdpa_cudnn": ("#56b4e9", "^"),
    "flex": ("#cc79a7", "D"),
    "flash_torch": ("#e69f00", "v"),
    "flash_triton": ("#d55e00", "P"),
    "block_sparse": ("#009e73", "X"),
    "block_sparse_unpruned": ("#00806a", "h"),
}
line_style = functools.partial(looks.line_style, styles=STYLES)
