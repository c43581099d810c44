"""Number formats of expert weights: what the bytes of a record mean.

A weight [N, K] of N outputs and K inputs lies in a record as one to four *planes*, all row-major:

| plane | name | shape | dtype |
|---|---|---|---|
| codes | `gate_up_proj` | [N, K/2] (4 bit) or [N, K] | uint8, int8 (`int8`), float (`plain`) |
| scales | `gate_up_proj_scales` | [ceil(N/rows), ceil(K/columns)] | see `SCALE_DTYPES` |
| zeros | `gate_up_proj_zeros` | as the scales, only with `has_zero` | uint8 |
| global | `gate_up_proj_global` | [N], only with `has_global` | float32 |

`WeightCode` says which ones there are and how they are read, `code_books` what one code is worth,
and `dequantise` is the reference that every kernel is compared with.
"""
