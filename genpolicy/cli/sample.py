"""The verb sample: draws with a policy's deployed sampler, a file per sample and a grid."""

from argparse import Namespace
from pathlib import Path

from PIL import Image
from torch import Tensor

from genpolicy.cli.sections import sampler_keys
from genpolicy.config.errors import ConfigError
from genpolicy.config.whole_file import replacing
from genpolicy.evaluation import pictures, videos
from genpolicy.evaluation.prompt_scores import draw
from genpolicy.policy.files import saved
from genpolicy.training.build import prompt_lines


def run(args: Namespace) -> int:
    """Draws ``args.n`` samples of each prompt into the folder ``args.out``."""
    if args.n < 1:
        raise ConfigError(f"--n is {args.n}; it must be at least 1")
    found = saved(args.policy, trust=args.trust, **sampler_keys(args))
    if found.acts:
        raise ConfigError(
            f"{args.policy} acts, it does not draw: genpolicy evaluate plays and films it"
        )
    prompts = _prompts(args.prompts)
    shown = [prompt for prompt in prompts for _ in range(args.n)]
    outputs = draw(found.load(), prompts, args.n, args.seed)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for row, output in enumerate(outputs):
        _write(output, out / f"{row // args.n:03d}_{row % args.n:02d}")
    pictures.grid(outputs, shown, out / "grid.png", columns=args.n if args.n > 1 else 8)
    drawn = f"{len(outputs)} sample{'s' * (len(outputs) > 1)}"
    asked = f"{len(prompts)} prompt{'s' * (len(prompts) > 1)}"
    print(f"{drawn} of {asked} in {out}, all together in {out / 'grid.png'}")
    return 0


def _prompts(text: str) -> tuple[str, ...]:
    """The lines of a prompt file, or the one prompt that ``text`` is."""
    path = Path(text)
    is_file = path.suffix == ".txt" or path.is_file() or text.startswith("assets/")
    prompts = prompt_lines(text) if is_file else (text,)
    if not all(prompt.strip() for prompt in prompts):
        raise ConfigError("--prompts is empty: give a prompt, or a file with one a line")
    return prompts


def _write(output: Tensor, stem: Path) -> None:
    """Writes a picture [3,H,W] as a PNG, a video [F,3,H,W] as a GIF and an MP4."""
    if output.ndim == 4:
        videos.write(pictures.pixels(output), stem)
        return
    (picture,) = pictures.pixels(output[None])
    with replacing(stem.with_suffix(".png")) as staged:
        Image.fromarray(picture).save(staged)
