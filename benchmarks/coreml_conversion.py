"""Does every layer of the spaces convert to Core ML, with fp16 in and out and no cast? On any system with coremltools.

    python benchmarks/coreml_conversion.py                           # every space that ships
    python benchmarks/coreml_conversion.py --space efficientformer-tiny

Each different layer that a table has a row for is converted once, beside it a chain of four of each kind of block, and the
smallest and the largest network of each space.
"""

import argparse
import time
from collections import Counter
from dataclasses import replace

from nas.coreml_package import convert, coremltools, operations
from nas.measure import Model, build_module, name_of
from nas.progress import progress, say
from nas.table import measured_layers
from supernet.errors import InputError
from supernet.space import SearchSpace, space_names
from supernet.specs import is_block


def models_of(space: SearchSpace) -> dict[Model, str]:
    """Return the models to convert, and what each is."""
    layers = measured_layers(space.layers())
    found: dict[Model, str] = {(layer,): layer.spec.kind for layer in layers}
    blocks = {layer.spec.kind: layer for layer in layers if is_block(layer.spec)}
    found |= {(block,) * 4: "chain" for block in blocks.values()}
    return found | {tuple(arch.layers()): "network" for arch in (space.smallest, space.largest)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", action="append", help="a space; may be given again (default: all that ship)")
    names = parser.parse_args().space or space_names()
    models: dict[Model, str] = {}
    for name in names:
        mine = models_of(replace(SearchSpace.load(name), mux=()))  # Core ML is timed one image at a time
        print(f"{name}: {len(mine)} models, {len(mine.keys() - models.keys())} of them new")
        models |= mine
    start, done, failed = time.perf_counter(), Counter[str](), 0
    with progress("converting", len(models)) as tick:
        for model, what in models.items():
            try:
                stray = {"cast", "batch_norm"} & set(operations(convert(*build_module(model, deploy=True))))
                if stray:
                    raise InputError(f"it has a {' and a '.join(sorted(stray))}")
                done[what] += 1
            except InputError as error:
                failed += 1
                say(f"{name_of(model)}: {error}")
            tick(1)
    seconds = time.perf_counter() - start
    print(", ".join(f"{count} {what}" for what, count in done.items()))
    print(
        f"{sum(done.values())} of {len(models)} converted with fp16 in and out and no cast or batch norm, {failed} failed, in "
        f"{seconds:.0f} s (coremltools {coremltools().__version__})"
    )
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
