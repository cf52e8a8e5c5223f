"""RowFields of row_state.cuh, as numpy sees it. tests/unit/test_kernels_row_layout.py compares the two."""

from __future__ import annotations

import numpy as np

ROW_WORDS = 32
PROCESS, TRUNCATE, PENALTIES = 1, 2, 4

ROW_FIELDS = np.dtype(
    {
        "names": [
            "num_computed", "num_prompt", "seed_low", "seed_high", "temperature", "top_k", "top_p", "min_p",
            "repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens", "flags", "num_bias", "num_stop",
            "num_bad_words", "extras", "allowed",
        ],
        "formats": ["<i4", "<i4", "<u4", "<u4", "<f4", "<i4", *["<f4"] * 5, "<i4", "<u4", *["<i4"] * 3, "<u8", "<u8"],
        "offsets": [*range(0, 64, 4), 64, 72],
        "itemsize": ROW_WORDS * 4,
    }
)  # fmt: skip
