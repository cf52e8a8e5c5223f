"""Which kernels a model needs, with which definitions: what a worker compiles at start and tests compile without a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from kernels.product_rows import GEMM_SHAPES, MATVEC_ROWS

FUSED_ROWS = 4
"""Products with at most so many rows normalise their input themselves (matvec_fused.cu)."""

SAMPLE_PARTS = 16
CLUSTER = 8
"""Blocks that share a row with top_k, top_p or min_p where the architecture has clusters: as many as any that has them takes."""
CLUSTER_ROWS = 64
"""With more rows a block has its row to itself, for clusters would wait for room. On an H200 both take as long at some 64."""
_LISTED, _CLUSTER_LISTED = 8192, 448
"""Tokens that a block can list which has its row to itself, and one of a cluster."""
_MOST_HELD = 144 << 10, 80 << 10
"""Bytes of its slice of the row that such a block holds in shared memory at most: where a device gives 160 KiB to a block, or not."""
_SAMPLE_BLOCKS = 768
"""What a Hopper chip runs at once of sample.cu: more blocks would only begin again what they have learned of their row."""

MAX_LOGPROBS = 20
WGMMA_ARCHITECTURE = "sm_90a"
DECODE_FEW_ROWS = 8
"""Decode attention of at most so many rows fetches more of a row before it waits, at one block a multiprocessor."""

DECODE_LAYERED_ROWS = 65
"""From so many rows on, decode attention leaves its shortest items to blocks that start where others have ended."""

_FEW_SPLITS = 16

PREFIX_TILE = 128
"""Tokens of a tile of prefix_attention.cu; shared prefixes and their parts are whole tiles."""

NORM_KERNELS = ("matvec_norm_qkv", "matvec_norm_silu", "matvec_norm_float")

Definitions = dict[str, int | str]


class ShapeError(Exception):
    """The kernels do not cover this model; the text names the field."""


@dataclass(frozen=True, slots=True)
class KernelShape:
    """What the kernels are specialised for. Sizes in elements; splits in tokens."""

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    qk_norm: bool
    float16: bool
    split: int = 1024
    """Tokens of a decode-attention item, a multiple of 128: what one block streams well, so that most rows need no merging across
    blocks."""
    few_split: int = 512
    """The same in steps of at most MATVEC_ROWS tokens, where blocks are idle otherwise, of rows that make at most 16 of them."""

    def __post_init__(self) -> None:
        if self.head_dim not in (64, 128):
            raise ShapeError(f"head_dim: the cuda backend supports 64 and 128, not {self.head_dim}")
        if self.block_size % 16:
            raise ShapeError(f"block_size: must be a multiple of 16 on the cuda backend, not {self.block_size}")
        if self.hidden_size % 8 or self.intermediate_size % 8:
            raise ShapeError("hidden_size and intermediate_size: must be multiples of 8 on the cuda backend")
        for name, split in (("split", self.split), ("few_split", self.few_split)):
            if split <= 0 or split % 128:
                raise ShapeError(f"{name}: must be a multiple of 128, not {split}")

    @property
    def q_size(self) -> int:
        """Width of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        """Width of the fused QKV product."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def decode_tiles(self) -> int:
        """Blocks of 16 query heads that share a KV head."""
        return -(-(self.num_heads // self.num_kv_heads) // 16)


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """One source file with one set of definitions, and the kernels to take from it."""

    source: str
    definitions: Definitions
    kernels: tuple[str, ...]


GEMM_KERNELS = ("gemm_parts", "gemm_float", "gemm_silu", "sum_parts")
GEMM_THREADS = 320
_GEMM_BLOCKS = 132  # of a Hopper chip; a constant, since the order of K follows from it


@dataclass(frozen=True, slots=True)
class GemmTile:
    """One build of gemm_wgmma.cu: for so many rows of x, with so many stages of w and of x."""

    rows: int
    w_stages: int
    x_stages: int

    @property
    def name(self) -> str:
        """For launcher.py."""
        return f"gemm-{self.rows}"

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block: stages of 64 k, of 128 rows of w and of all rows of x."""
        return (self.w_stages * 128 + self.x_stages * self.rows) * 128


GEMM_TILES = (GemmTile(64, 9, 8), GemmTile(128, 6, 7))
"""208 KiB each: what is left is enough for the blocks of the small kernels between."""


def gemm_rows(shape: KernelShape, architecture: str) -> int:
    """GATE_UP of more than MATVEC_ROWS and at most so many rows takes gemm_wgmma.cu; 0: it takes none of this model's products."""
    sizes = (shape.hidden_size, shape.qkv_size, shape.q_size, shape.intermediate_size)
    return GEMM_SHAPES.get(sizes, 0) if architecture == WGMMA_ARCHITECTURE else 0


def gemm_tile(rows: int) -> GemmTile:
    """The build that takes `rows` rows, at most as many as the largest."""
    return next(tile for tile in GEMM_TILES if rows <= tile.rows)


def gemm_spec(tile: GemmTile, common: Definitions) -> KernelSpec:
    """Tensor-core products of few rows; N and K are arguments."""
    sizes: Definitions = {"ROWS": tile.rows, "W_STAGES": tile.w_stages, "X_STAGES": tile.x_stages}
    return KernelSpec("gemm_wgmma.cu", {**sizes, **common}, GEMM_KERNELS)


def gemm_splits(n: int, k: int) -> int:
    """Parts of K that a product of n x k is summed in, whatever the number of rows."""
    return max(1, min(8, _GEMM_BLOCKS // (n // 128), k // 64))


def matvec_warps(k: int) -> int:
    """4 to 8 warps that share K evenly in steps of 32; 0 where the matrix-vector kernel does not fit."""
    return next((warps for warps in range(8, 3, -1) if k % (32 * warps) == 0), 0)


def norm_threads(hidden_size: int) -> int:
    """Threads that share a row's norm: as many as a product over that row has, since their number decides the bits."""
    return 32 * (matvec_warps(hidden_size) or 4)


def matvec_spec(k: int, max_rows: int, depth: int, common: Definitions) -> KernelSpec:
    """The matrix-vector kernel for `k` columns and up to `max_rows` (8 or 16) rows of x."""
    definitions = {"K": k, "WARPS": matvec_warps(k), "M_MAX": max_rows, "DEPTH": depth, **common}
    return KernelSpec("matvec.cu", definitions, ("matvec", "matvec_float", "matvec_silu"))


def fused_spec(max_rows: int, depth: int, shape: KernelShape, heads: Definitions) -> KernelSpec:
    """Products over hidden_size with norm, rotation and append, for up to `max_rows` (8 or 16) rows of x."""
    k = shape.hidden_size
    definitions = {"K": k, "WARPS": matvec_warps(k), "M_MAX": max_rows, "DEPTH": depth, **heads}
    return KernelSpec("matvec_fused.cu", definitions, ("matvec_qkv", *(NORM_KERNELS if max_rows == 8 else ())))


def matvec_shared_bytes(k: int, max_rows: int, depth: int) -> int:
    """Dynamic shared memory of a matrix-vector block."""
    warps = matvec_warps(k)
    steps = k // (32 * warps)
    return warps * min(depth, steps) * (2 if steps <= 8 else 2 + max_rows // 8) * 512


def normed_shared_bytes(k: int, rows: int, depth: int) -> int:
    """The same where the block makes its `rows` of x itself."""
    warps = matvec_warps(k)
    return warps * min(depth, k // (32 * warps)) * 2 * 512 + rows * (k + 32) * 2


def is_roomy(matvec_depth: int) -> bool:
    """Whether the device gives a block 160 KiB of shared memory, which is what a depth of 8 is chosen for."""
    return matvec_depth == 8


def sample_parts(rows: int) -> int:
    """Blocks that share a row of logits in sample.cu. No token depends on it."""
    return max(1, min(SAMPLE_PARTS, _SAMPLE_BLOCKS // rows))


def capability(architecture: str) -> int:
    """Such as 90 of "sm_90a"."""
    return int("".join(digit for digit in architecture if digit.isdigit()))


def truncated_threads(clustered: bool) -> int:
    """Threads of a block of truncated_sample.cu. Alone with its row it has a multiprocessor. Of a cluster there is room for three of
    384, each with its slice of a vocabulary of 128k: one copies its slice while the others work on theirs."""
    return 384 if clustered else 1024


def most_held(roomy: bool) -> int:
    """Bytes of a slice beyond which the row is read from device memory in every pass. No token depends on it."""
    return _MOST_HELD[0 if roomy else 1]


TRUNCATED_SHARED_BYTES = _LISTED * 8
"""Dynamic shared memory of a block that has its row to itself."""


def truncated_shared_bytes(vocab: int, roomy: bool) -> tuple[int, bool]:
    """Dynamic shared memory of a cluster's block, and whether it holds its slice of the row, as truncated_sample.cu cuts it."""
    lists, part = CLUSTER * _CLUSTER_LISTED * 8, -(-vocab // (4 * CLUSTER)) * 16
    holds = part <= most_held(roomy)
    return max(lists, part if holds else 0), holds


def truncated_spec(architecture: str, clustered: bool) -> KernelSpec:
    """Rows with top_k, top_p or min_p, by a cluster of blocks each (from sm_90 on) or by one block each."""
    threads = truncated_threads(clustered)
    # From sm_120 on a multiprocessor has shared memory for one slice.
    resident = 1 if capability(architecture) >= 120 else 3
    blocks: Definitions = {"CLUSTER": CLUSTER, "BLOCKS": resident} if clustered else {"CLUSTER": 1, "BLOCKS": 1}
    listed = _CLUSTER_LISTED if clustered else _LISTED
    kernels = ("choose_truncated", "choose_truncated_held") if clustered else ("choose_truncated",)
    return KernelSpec("truncated_sample.cu", {"WIDE": threads, "LISTED": listed, **blocks}, kernels)


def decode_split(shape: KernelShape, tokens: int, attended: int) -> int:
    """Tokens of an item of a row that attends to so many, in a step of so many tokens. A row's bits follow from it, so it hangs on
    nothing else: as the order of the products' sums, it is one up to MATVEC_ROWS tokens and another one beyond."""
    few = tokens <= MATVEC_ROWS and attended <= few_attended(shape)
    return shape.few_split if few else shape.split


def few_attended(shape: KernelShape) -> int:
    """Tokens beyond which a row's items are of `split` in any step: to add up more of `few_split` takes longer than it saves."""
    return _FEW_SPLITS * shape.few_split


def largest_split(shape: KernelShape) -> int:
    """The largest that decode_split gives, for which plan_decode has its table."""
    return max(shape.split, shape.few_split)


def most_decode_items(shape: KernelShape, rows: int, context: int) -> int:
    """Items of at most `rows` rows of at most `context` tokens each, in a step of however many tokens."""
    of_few = min(context, few_attended(shape)) // shape.few_split + 2
    return max(min(rows, MATVEC_ROWS) * of_few, rows * (context // shape.split + 2))


def decode_slots(head_dim: int) -> int:
    """Parts of a decode-attention item whose sums stay apart until the end."""
    return 8 if head_dim == 64 else 4


def decode_warps(head_dim: int, few: bool) -> int:
    """Warps of a decode-attention block."""
    return decode_slots(head_dim) if few else 4


def decode_blocks(shape: KernelShape, few: bool, roomy: bool, hopper: bool) -> int:
    """Decode-attention blocks that a multiprocessor holds at once, by its registers and its shared memory: 228 KiB on Hopper, 164 on
    what else is roomy. The system keeps 1 KiB of each block's."""
    if few or not roomy:
        return 1 if few else 2
    by_registers = 4 if shape.head_dim == 64 and shape.num_heads // shape.num_kv_heads <= 8 else 3
    return min(by_registers, ((228 if hopper else 164) << 10) // (decode_shared_bytes(shape, few) + 1024))


def decode_layers(shape: KernelShape, rows: int, after_prefix: bool) -> int:
    """Layers of a decode-attention grid, two where the second takes the shortest items: with head_dim 64, as measured on an H200, and
    not behind a shared prefix, which leaves only short ones."""
    return 2 if rows >= DECODE_LAYERED_ROWS and shape.head_dim == 64 and not after_prefix else 1


def decode_depth(few: bool) -> int:
    """Iterations of 16 tokens a warp under way in decode attention."""
    return 4 if few else 2


def decode_merge_ahead(shape: KernelShape, few: bool) -> int:
    """Splits of a row, a multiple of 4, that are fetched in one trip to memory where they are merged: what registers are there for, of
    which those of a few rows leave a block of the QKV product its own."""
    if not few:
        return 4
    return 16 if shape.num_heads // shape.num_kv_heads <= 8 else 8


def decode_shared_bytes(shape: KernelShape, few: bool) -> int:
    """Dynamic shared memory of a decode-attention block: the rings of its warps and its slots' results."""
    rings = decode_warps(shape.head_dim, few) * decode_depth(few) * shape.head_dim // 8 * 512
    heads = min(shape.num_heads // shape.num_kv_heads, 16)
    return rings + decode_slots(shape.head_dim) * heads * (shape.head_dim + 2) * 4


def decode_spec(
    shape: KernelShape, few: bool, blocks: int, heads: Definitions, after_prefix: bool = False
) -> KernelSpec:
    """Decode attention, for a step of few rows or of many, or after prefix attention; `blocks` as decode_blocks says."""
    sizes: Definitions = {
        "SLOTS": decode_slots(shape.head_dim),
        "WARPS": decode_warps(shape.head_dim, few),
        "DEPTH": decode_depth(few),
        "BLOCKS": blocks,
        "MERGE_AHEAD": decode_merge_ahead(shape, few),
    }
    after: Definitions = {"AFTER_PREFIX": 1} if after_prefix else {}
    return KernelSpec("decode_attention.cu", {**heads, **sizes, **after}, ("decode_attention",))


def prefill_tile_rows(head_dim: int, wgmma: bool) -> int:
    """Pairs (token, query head) of a tile of prefill attention, and with `wgmma` of prefix attention."""
    return 192 if wgmma and head_dim == 64 else 128


def wgmma_shared_bytes(shape: KernelShape) -> int:
    """Dynamic shared memory of prefill_wgmma and prefix_attention: queries, and stages of 128 keys and values."""
    stages = 3 if shape.head_dim == 64 else 2
    return (prefill_tile_rows(shape.head_dim, wgmma=True) + 2 * stages * 128) * shape.head_dim * 2


def prefill_shared_bytes(shape: KernelShape) -> int:
    """Dynamic shared memory of a prefill-attention block: two stages of 64 keys and values."""
    return 4 * 64 * shape.head_dim * 2


def kernel_specs(shape: KernelShape, matvec_depth: int, architecture: str) -> dict[str, KernelSpec]:
    """Everything that a model of this shape runs on `architecture`, by a name for launcher.py."""
    common: Definitions = {"FLOAT16": 1} if shape.float16 else {}
    heads: Definitions = {
        "HEADS": shape.num_heads,
        "KV_HEADS": shape.num_kv_heads,
        "HEAD_DIM": shape.head_dim,
        "BLOCK_SIZE": shape.block_size,
        **common,
    }
    qk_norm: Definitions = {"QK_NORM": 1} if shape.qk_norm else {}
    hidden: Definitions = {"HIDDEN": shape.hidden_size, **common}
    norm: Definitions = {"THREADS": norm_threads(shape.hidden_size), **hidden}
    roomy = is_roomy(matvec_depth)
    few_blocks, blocks = (decode_blocks(shape, few, roomy, architecture == WGMMA_ARCHITECTURE) for few in (True, False))
    rows = ("apply_plan", "copy_words", "prepare_tokens", "plan_decode", "count_tokens")
    specs = {
        "embedding": KernelSpec("embedding.cu", hidden, ("embedding",)),
        "rms_norm": KernelSpec("rms_norm.cu", norm, ("rms_norm", "rms_norm_add", "rms_norm_add_parts")),
        "silu_mul": KernelSpec("silu_mul.cu", {"WIDE": shape.intermediate_size, **common}, ("silu_mul",)),
        "qkv_epilogue": KernelSpec("qkv_epilogue.cu", {**heads, **qk_norm}, ("qkv_epilogue", "qkv_epilogue_parts")),
        "decode_attention": decode_spec(shape, False, blocks, heads),
        "prefill_attention": KernelSpec("prefill_attention.cu", heads, ("prefill_attention",)),
        "row_state": KernelSpec(
            "row_state.cu", {"BLOCK_SIZE": shape.block_size, "LARGEST_SPLIT": largest_split(shape)}, rows
        ),
        "process_logits": KernelSpec("process_logits.cu", {"PARTS": SAMPLE_PARTS}, ("process_logits",)),
        "sample": KernelSpec("sample.cu", {"PARTS": SAMPLE_PARTS}, ("choose", "commit")),
        "truncated_sample": truncated_spec(architecture, clustered=False),
        "logprobs": KernelSpec("logprobs.cu", {"WANTED": MAX_LOGPROBS}, ("logprobs",)),
    }
    if capability(architecture) >= 90:
        specs["truncated_sample-cluster"] = truncated_spec(architecture, clustered=True)
    if roomy:
        specs["decode_attention-few"] = decode_spec(shape, True, few_blocks, heads)
    if architecture == WGMMA_ARCHITECTURE:
        specs["prefill_wgmma"] = KernelSpec("prefill_wgmma.cu", heads, ("prefill_wgmma",))
        specs["prefix_attention"] = KernelSpec("prefix_attention.cu", heads, ("prefix_attention",))
        specs["decode_attention-prefix"] = decode_spec(shape, False, blocks, heads, after_prefix=True)
    if most := gemm_rows(shape, architecture):
        specs |= {tile.name: gemm_spec(tile, common) for tile in GEMM_TILES[: GEMM_TILES.index(gemm_tile(most)) + 1]}
    for k in sorted({shape.hidden_size, shape.q_size, shape.intermediate_size}):
        if matvec_warps(k):
            for max_rows in (8, 16):
                specs[f"matvec-{k}-{max_rows}"] = matvec_spec(k, max_rows, matvec_depth, common)
    room = (160 if roomy else 88) << 10
    fits = matvec_warps(shape.hidden_size) and normed_shared_bytes(shape.hidden_size, FUSED_ROWS, matvec_depth) <= room
    if fits and not shape.qk_norm:
        for max_rows in (8, 16):
            specs[f"fused-{max_rows}"] = fused_spec(max_rows, matvec_depth, shape, heads)
    return specs
