"""The colour and marker of each method of linear layers."""

import functools

from tools.drawing import looks

STYLES = {
    "dense_single": ("#7a7f87", "s"),
    "dense_tp_row": ("#0072b2", "o"),
    "dense_tp_column": ("#56b4e9", "^"),
    "masked_split": ("#cc79a7", "D"),
    "block_shock": ("#d55e00", "P"),
    "block_shock_folded": ("#009e73", "X"),
}
line_style = functools.partial(looks.line_style, styles=STYLES)
