"""Write envs/*.yaml with the versions of requirements.lock: `python envs/pin.py [--check]`."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
COMMON = ["numpy", "pandas", "pyarrow", "pydantic", "tqdm", "anndata", "scipy"]
# One environment per stage family: packages the family's scripts import, beyond COMMON.
ENVIRONMENTS = {
    "data": ["scanpy", "scikit-learn", "igraph", "pynndescent", "requests"],
    "torch": ["torch", "safetensors", "numba"],
    "torch-cuda": ["torch", "safetensors", "numba"],
    "inference": ["scikit-learn", "statsmodels", "ppi-python", "joblib"],
    "figures": ["matplotlib", "adjustText", "scanpy", "igraph", "pynndescent", "scikit-learn"],
}
HEADER = {
    "torch": "# torch as PyPI has it: on Linux with CUDA libraries, which run on the CPU too.",
    "torch-cuda": "# torch with CUDA 12.6, for run.device: cuda; another CUDA version: change the index below to match your driver.",
}
CUDA_INDEX = "--extra-index-url https://download.pytorch.org/whl/cu126"


def versions() -> dict[str, str]:
    """Package -> version in the lock, names in lower case."""
    lines = (HERE.parent / "requirements.lock").read_text().splitlines()
    pins = [line.split(";")[0].strip().split("==") for line in lines if "==" in line and not line.startswith("#")]
    return {name.lower(): version for name, version in pins}


def render(name: str) -> str:
    """The text of one environment file."""
    pins = versions()
    lines = [HEADER[name]] if name in HEADER else []
    lines += ["# Pins come from requirements.lock: run `make lock`, do not edit.", f"name: dbdiffusion-{name}"]
    lines += ["channels:", "  - conda-forge", "  - nodefaults", "dependencies:", "  - python=3.11", "  - pip", "  - pip:"]
    if name == "torch-cuda":
        lines.append(f'      - "{CUDA_INDEX}"')
    lines += [f"      - {package}=={pins[package.lower()]}" for package in sorted(COMMON + ENVIRONMENTS[name], key=str.lower)]
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    stale = []
    for name in ENVIRONMENTS:
        path = HERE / f"{name}.yaml"
        if "--check" in arguments:
            if not path.exists() or path.read_text() != render(name):
                stale.append(path.name)
        else:
            path.write_text(render(name))
    if stale:
        print(f"out of date: {stale}; run `python envs/pin.py`")
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
