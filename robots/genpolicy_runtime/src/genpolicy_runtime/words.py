"""An exported policy's manifest in words."""

from collections.abc import Iterator

from genpolicy_runtime.manifest import Manifest, Observed


def words(manifest: Manifest) -> Iterator[str]:
    """The lines that `genpolicy-runtime check` prints."""
    action, made = manifest.action, manifest.made_with
    yield f"made by      {', '.join(f'{name} {version}' for name, version in made.items())}"
    yield f"weights      sha256 {manifest.weights}"
    for graph in manifest.graphs.values():
        kinds = sorted({one.dtype for one in (*graph.inputs.values(), *graph.outputs.values())})
        yield f"graph        {graph.name} in {graph.file}, numbers {', '.join(kinds)}"
    for name, one in manifest.observation.items():
        yield f"sees         {name}: {_seen(one)}"
    yield f"history      {_count(manifest.history, 'frame')}, one per tick"
    if manifest.instruction is not None:
        way = "unless it is told other tokens" if manifest.instruction.tokens else "fixed"
        yield f"instruction  {manifest.instruction.text!r}, {way}"
    rate = "at the rate of its task, which is not known"
    if manifest.rate_hz is not None:
        rate = f"at {manifest.rate_hz:g} Hz, the rate of its task"
    yield (
        f"acts         {_count(action.dim, 'number')} per tick in the units of the"
        f" {action.units}, {rate}"
    )
    yield f"clipped      {_limits(action.low, 'least')}, {_limits(action.high, 'most')}"
    planned = _count(action.planned, "action")
    yield f"plans        {planned}, of which {action.executed} are executed"
    yield f"costs        {manifest.evaluations:g} evaluations of the network per plan"
    yield f"noise        {_count(manifest.noise[0], 'draw')} per plan"
    if manifest.state is not None:
        yield "state        a plan begins from the one before"
    yield f"sampler      {', '.join(f'{name} {value}' for name, value in manifest.sampler.items())}"
    yield f"parity       {', '.join(f'{name} {value}' for name, value in manifest.parity.items())}"


def _limits(numbers: "tuple[float, ...] | None", end: str) -> str:
    said = "not known" if numbers is None else " ".join(f"{number:g}" for number in numbers)
    return f"{end} {said}"


def _seen(one: Observed) -> str:
    if one.kind == "vector":
        return _count(one.shape[0], "number")
    return f"a picture of {one.shape[1]} x {one.shape[2]} pixels (height x width)"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
