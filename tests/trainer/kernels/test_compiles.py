"""Compiles all kernels for GPUs, which needs none: it shows errors of Triton's compiler, and narrow loads."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.minutes,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is for Linux"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
]

_FLOATS = {"epsilon", "momentum", "smoothing"}
_INTEGERS = {"rows", "height", "width", "out_height", "out_width", "units", "blocks", "columns", "num_params"}
_INTEGERS |= {"channels", "size", "classes"}
_OF_TYPE = {
    "*bf16": {"x", "pooled", "z", "residual", "dz", "du", "dx", "dy", "logits"},
    "*u8": {"index", "images", "pixels"},
    "*i64": {"indices", "labels"},
}
_BLOCK = {"UNIT": 8, "BM": 32, "BC": 64}
_CONV = {"KERNEL_X": 3, "PAD_Y": 1, "PAD_X": 1, "BM": 64, "BK": 32, "PROGRAMS": 128}
KERNELS: list[tuple[str, str, dict[str, Any]]] = [
    ("norm_kernels", "statistics", {"POOL": 2, "PROGRAMS": 1024, **_BLOCK}),
    ("norm_kernels", "statistics", {"POOL": 1, "PROGRAMS": 1024, **_BLOCK}),
    ("norm_kernels", "merge_statistics", {"UNIT": 8, "BC": 8, "PROGRAMS": 1024}),
    ("norm_kernels", "activate", {"NORM": True, "RESIDUAL": False, "ACT": "gelu", **_BLOCK}),
    ("norm_kernels", "reduce_gradient", {"NORM": True, "RESIDUAL": True, "ACT": "relu", "PROGRAMS": 1024, **_BLOCK}),
    ("norm_kernels", "reduce_gradient", {"NORM": False, "RESIDUAL": False, "ACT": "gelu", "PROGRAMS": 64, **_BLOCK}),
    ("norm_kernels", "merge_sums", {"BC": 8, "PROGRAMS": 1024}),
    (
        "norm_kernels",
        "apply_gradient",
        {"NORM": True, "ACT": "gelu", "POOL": 2, "LEFT_Y": 1, "LEFT_X": 1, **_BLOCK},
    ),
    ("norm_kernels", "global_maximum", {"UNIT": 8, "BP": 16, "BC": 64}),
    ("norm_kernels", "global_maximum_gradient", {"UNIT": 8, "BP": 16, "BC": 64}),
    ("norm_kernels", "pool_bias_relu", {"POOL": 3, "OFF": 255, **_BLOCK}),
    (
        "norm_kernels",
        "pool_bias_relu_gradient",
        {"POOL": 3, "LEFT_Y": 0, "LEFT_X": 2, "OFF": 255, "PROGRAMS": 128, **_BLOCK},
    ),
    ("image_kernels", "gather_and_shift", {"RESIZE": False, "UPSIDE_DOWN": True, "FILL": "reflect", "BLOCK": 1024}),
    ("image_kernels", "gather_and_shift", {"RESIZE": True, "UPSIDE_DOWN": False, "FILL": "zero", "BLOCK": 1024}),
    ("image_kernels", "gather_and_warp", {"UPSIDE_DOWN": False, "BLOCK": 1024}),
    (
        "image_kernels",
        "jitter",
        {"CHANNELS": 3, "BRIGHTNESS": True, "CONTRAST": True, "SATURATION": True, "BLOCK": 1024},
    ),
    ("image_kernels", "normalize", {"CHANNELS": 3, "OUT_CHANNELS": 8, "PADDED": 8, "BM": 256}),
    ("loss_kernels", "cross_entropy", {"BM": 64, "BC": 16}),
    ("conv_kernels", "weight_gradient", {"CHANNELS": 16, "FILTERS": 32, "K": 144, "BN": 32, **_CONV}),
]


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_with_wide_loads(capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    for module, name, constants in KERNELS:
        kernel = getattr(importlib.import_module(f"trainer.kernels.{module}"), name)
        types = {each: "constexpr" if each in constants else _type_of(each) for each in kernel.arg_names}
        pointers = {(place,): [["tt.divisibility", 16]] for place, kind in enumerate(types.values()) if kind[0] == "*"}
        values = {(place,): constants[each] for place, each in enumerate(types) if each in constants}
        source = ASTSource(fn=kernel, signature=types, constexprs=values, attrs=pointers)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
        if module in ("norm_kernels", "conv_kernels") and name != "merge_sums":
            assert "ld.global.v4" in compiled.asm["ptx"], f"{name} loads less than 16 bytes at a time"


def _type_of(name: str) -> str:
    if name in _FLOATS or name in _INTEGERS:
        return "fp32" if name in _FLOATS else "i32"
    return next((kind for kind, names in _OF_TYPE.items() if name in names), "*fp32")
