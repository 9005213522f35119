"""`instep train`: a recipe on a model, then measurement, report and a table in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import tyro

from instep.bundled import DEFAULT, DESCRIBED, WORLDS, find, load
from instep.cli import default_threads
from instep.cli.rewards import load_reward
from instep.core.elsewhere import wait_to_speak
from instep.core.numbers import check_number, check_whole
from instep.core.ranks import joined
from instep.core.size import Size
from instep.core.user_code import load_function
from instep.data.latent_cache import FOLDER, real_samples
from instep.data.prompt import Prompt, load_prompts, with_negative
from instep.data.real_files import RealFile, real_files
from instep.data.samples import PairSamples, RealSamples
from instep.methods.recipe import Recipe
from instep.models.family import Family
from instep.rewards.base import Reward
from instep.training.checks import check_ranks
from instep.training.execution import Execution
from instep.training.hold import parse as parse_hold
from instep.training.loop import Interrupted
from instep.training.options import LARGEST_SEED, RunOptions
from instep.training.probe import KnownTeacher, Monitor, few_of
from instep.training.run import Run, final_samples, train

if TYPE_CHECKING:
    from instep.data.pairs import PreferencePair, PreferredSample

MODEL_HELP = f"A bundled model: {DESCRIBED}; or the path of a diffusers pipeline folder."


@dataclass(frozen=True)
class TrainArgs:
    """Options of `instep train` besides the recipe's own."""

    out: Path | None = None
    """Folder of the run; default runs/RECIPE-SEED. The same command on the same folder resumes the run."""
    model: Annotated[str, tyro.conf.arg(help=MODEL_HELP)] = DEFAULT
    prompts: Path | None = None
    """Text file, one prompt a line (or JSON lines with a "prompt"); for image-to-video each line names its first frame, "a cat runs [image: cat.png]" (or has
    an "image"). A line may have a negative prompt too, "a cat runs [negative: blurry]" (or "negative"). Default: the bundled model's own."""
    negative_prompt: str | None = None
    """Negative prompt of the teacher's guidance for prompts without one of their own; without guidance it has no effect."""
    reward: str | None = None
    """Reward as a name of `instep rewards` (hpsv2, pickscore, videoalign:ta, ocr, compressible ...), or as module:function, called with (media [B, 3, F, H, W]
    in [0, 1], prompts); with "gradient=yes module:function" its gradient can be climbed; "command:python score.py", a program that prints scores;
    http://127.0.0.1:8000/score, an address that answers with them; preferences:FOLDER, learned by `instep pairs fit`; vlm:FOLDER or
    "model=NAME vlm:http://127.0.0.1:8000/v1", a vision-language model that compares samples; exact, of a bundled video model: 1 where its training
     classifier or reader finds the prompt followed, else 0, without a gradient. Settings precede the name: "timeout=30 retries=2 command:python
    score.py", "workers=8 batch=4 token=NAME_OF_VARIABLE https://host/score", "frames=4 hpsv2" (only 4 frames of each video, as images; clip=4 as a short
    video). Several with weights as 0.5*pickscore,hpsv2, each normalised before weighting; quote a command with commas. Default: the bundled model's training
    classifier. Protocols: docs/rewards.md."""
    real: Path | None = None
    """Your own images or videos, for recipes with real or preferred samples: a folder (the caption of a.mp4 is in a.txt beside it), or an index, .jsonl or
    .parquet, with the columns file and prompt; or a WebDataset shard, .tar, or a folder of them. They are cropped in the middle to the model's shape, resized,
    resampled to real_fps, and encoded once into a cache; an interrupted run goes on there. Default: the bundled model's own, else samples of the teacher."""
    real_fps: float = 16.0
    """Frames a second of the model's videos, at which real ones are read; Wan's are 16, CogVideoX's 8."""
    real_cache: Path | None = None
    """Folder of the encoded real samples, which runs of one model may share; default: real in the folder of the run."""
    pairs: Path | None = None
    """Labelled pairs, one JSON object a line: {"prompt": ..., "chosen": FILE, "rejected": FILE}, files beside it; their chosen samples also serve as
    real ones. Recipes that need preferred or real samples alone (dm-align-pair, dmd2 --gan) read no rejected ones, and rows may leave them out.
    Default: the bundled model's own."""
    tracker: str | None = None
    """Another tracker beside log.jsonl and TensorBoard, as module:function, called with (step, scalars) for every row."""
    seed: int = 0
    """One seed for everything; the same seed and thread count give the same weights."""
    threads: int | None = None
    """CPU threads; default: all cores."""
    start_from: Path | None = None
    """Another run, whose student and critics initialise this one."""
    size: tuple[int, int, int] | None = None
    """Height, width and frames of the videos; default: 480 832 81, and a bundled model's own."""
    save_every: int = 25
    """Steps between checkpoints."""
    probe_every: int | None = None
    """Steps between probes (samples that feed the health checks and plots); default 20, and 5 with hold."""
    hold: str | None = None
    """Figures of the probe to hold while the reward rises, relative to the start of the stage: "diversity=0.95,matching=1.1" keeps at least 95 % of the
    diversity and lets the matching force grow by at most 10 %. After each probe a controller moves the weights of all reward terms by a common factor
    between 0 and 1, so that the reward rises as fast as these bounds and the weights you give allow. Figures: diversity, motion, mean_brightness,
    saturation, matching, those of the monitor (monitor_both, modes), and train_score where it is positive (a wrong name lists all)."""
    terms_every: int = 20
    """Steps between two measurements of the gradient of each term, which the log and the report show; one costs a backward pass a term. 0: none."""
    stop_on: tuple[str, ...] = ()
    """Health flags at which the run stops, goes back to its best checkpoint by the monitor, and exports that. hacking: the training reward rises while
    the monitor's share of right samples or the variety falls, or the matching force grows. Others: collapse, broken, exploded (a wrong name lists
    all). Detection needs frequent probes: --stop-on hacking --probe-every 5. The same command does not resume a stopped run; without this option it does."""
    teacher_samples: int = 512
    """Number of teacher samples to make and keep for recipes that need real samples or stored pairs, if none are given."""
    prompt_cache: Path | None = None
    """Folder of encoded prompts, which runs of one model or of several may share; default: prompts in the folder of the run. A resumed run finds its own."""
    patience: float = RunOptions.patience
    """With several processes (torchrun): minutes that one waits for another one within an iteration; then it ends the run, and the same command goes on from
    the newest checkpoint. Raise it if a reward's server may be silent for longer. Where the first process works alone (it probes, saves and exports), the
    others wait up to 60 minutes."""
    evaluate: bool = True
    """Measure the student against teacher and naive sampling at the end (bundled video models), and write the report."""

    teacher: Path | None = None
    """Folder of another model as the teacher, which may be of another size: Wan 14B teaches 1.3B. VAE, texts and noise levels have to be the same (one line
    says where they differ). Student and fake start from --model, the teacher's adapters act on the teacher; default: --model teaches itself."""
    variant: str | None = None
    """Word in the names of the model's files, as diffusers has it: fp16 reads model.fp16.safetensors. Default: the files without one."""

    execution: Annotated[Execution, tyro.conf.arg(name="")] = Execution()

    def __post_init__(self) -> None:
        whole = {"save_every": self.save_every, "probe_every": self.probe_every, "threads": self.threads, "teacher_samples": self.teacher_samples}
        for name, value in whole.items():
            if value is not None:
                check_whole(name, value, 1)
        check_whole("seed", self.seed, 0, LARGEST_SEED)
        check_number("real_fps", self.real_fps, 0, open_below=True)


@dataclass(frozen=True)
class Setting:
    """The inputs of a run besides its recipe."""

    family: Family
    prompts: tuple[Prompt, ...]
    reward: Reward | Callable[..., Any] | None
    monitor: Monitor | None
    real: RealSamples | None
    pairs: PairSamples | None = None
    known_teacher: KnownTeacher | None = None
    files: tuple[RealFile, ...] = ()
    """Real samples that all processes encode together."""


def train_command(recipe: Recipe, args: TrainArgs, command: str) -> int:
    """Runs the recipe; returns 0 when it is done, and 130 when it was interrupted and saved."""
    torch.set_num_threads(args.threads or default_threads())
    out = folder_of(recipe, args)
    options = RunOptions(
        seed=args.seed,
        save_every=args.save_every,
        probe_every=args.probe_every,
        execution=args.execution,
        teacher_samples=args.teacher_samples,
        stop_on=args.stop_on,
        prompt_cache=args.prompt_cache,
        hold=parse_hold(args.hold) if args.hold is not None else (),
        terms_every=args.terms_every,
        patience=args.patience,
    )
    tracker = load_function(args.tracker, "tracker") if args.tracker else None
    with joined(options.waits, options.execution.context_parallel) as ranks:
        check_ranks(recipe, ranks.parts)  # before a model is loaded
        with ranks.one_by_one():  # what the first one caches is there for the others
            setting = prepare(recipe, args)
        if setting.files:
            cache = args.real_cache or out / FOLDER
            setting = replace(setting, real=real_samples(setting.files, setting.family, cache, args.real_fps, ranks))
        try:
            run = train(
                recipe,
                setting.family,
                out=out,
                prompts=setting.prompts,
                negative_prompt=args.negative_prompt,
                reward=setting.reward,
                monitor=setting.monitor,
                real=setting.real,
                pairs=setting.pairs,
                start_from=args.start_from,
                options=options,
                tracker=tracker,
                known_teacher=setting.known_teacher,
                command=command,
                teacher=args.teacher,
            )
        except Interrupted as stopped:
            wait_to_speak(stopped)
            if ranks.first:
                print(f"stopped by {stopped}:\n  {command}", file=sys.stderr)
            return 130
        run.state.ranks.of_first(lambda: finish(run, setting, args.evaluate))
    return 0


def folder_of(recipe: Recipe, args: TrainArgs) -> Path:
    """The folder of the run."""
    return args.out or Path("runs") / f"{recipe.name}-{args.seed}"


def prepare(recipe: Recipe, args: TrainArgs) -> Setting:
    """Loads the model and the recipe's other inputs; errors here come before any training."""
    own_rewards = find(args.model).rewards if args.model in WORLDS else {}
    reward = load_reward(args.reward, own_rewards) if args.reward is not None else None
    prompts = tuple(load_prompts(args.prompts)) if args.prompts else None
    labelled = load_labelled(args.pairs, recipe) if args.pairs else None
    files = real_files(args.real) if args.real else None
    if files is not None and not recipe.needs & {"real", "preferred"}:
        raise ValueError(f"real: {recipe.name} uses no real samples; leave the option out, or choose a recipe that does, like dm-align-pair")
    if args.model in WORLDS:
        own = find(args.model).ready()
        # a user's own pairs bring their chosen samples with them
        needs = recipe.needs if labelled is None else frozenset()
        real = own.real() if needs & {"real", "preferred"} and files is None else None
        pairs = own.pairs() if "pairs" in needs else None
        asked = with_negative(prompts or own.prompts, args.negative_prompt)
        found = Setting(own.family, asked, reward or own.reward, own.monitor, real, pairs, own.known_teacher)
    else:
        if prompts is None:
            raise ValueError(f"prompts: none for model {args.model!r}; give a text file with one prompt a line, --prompts FILE")
        args.execution.check()
        family = load(args.model, Size(*args.size) if args.size else None, args.execution.loading_dtype(), args.variant)
        found = Setting(family, with_negative(prompts, args.negative_prompt), reward, None, None, None)
    if labelled is not None:
        real, pairs = labelled.encoded(found.family)
        found = replace(found, real=real, pairs=pairs)
    return replace(found, files=tuple(files or ()))


@dataclass(frozen=True)
class Labelled:
    """The rows of a file of labelled media: pairs, or preferred samples alone."""

    pairs: Sequence[PreferencePair] = ()
    preferred: Sequence[PreferredSample] = ()

    def encoded(self, family: Family) -> tuple[RealSamples | None, PairSamples | None]:
        """Their media as latents of the family."""
        from instep.data.media import pair_samples, preferred_samples

        return (preferred_samples(self.preferred, family), None) if self.preferred else (None, pair_samples(self.pairs, family))


def load_labelled(path: Path, recipe: Recipe) -> Labelled:
    """Reads and checks the rows of a file, preferred samples alone where the recipe needs no pairs; their media are not read yet."""
    from instep.data.pairs import read_pairs, read_preferred

    alone = recipe.needs & {"real", "preferred"} and "pairs" not in recipe.needs
    return Labelled(preferred=read_preferred(path)) if alone else Labelled(read_pairs(path))


def finish(run: Run, setting: Setting, evaluate: bool) -> None:
    """Writes samples, metrics and the report of a finished run."""
    prompts = few_of(setting.prompts, 8)
    final_samples(run, prompts)
    if not evaluate:
        return
    from instep.cli.evaluate import measure_run, measured_worlds, print_rows
    from instep.report import write_report
    from instep.report.read import read_runs
    from instep.report.verdict import answer

    if setting.family.name in measured_worlds():
        measured = measure_run(run.out)
        print(answer(read_runs([run.out])).text)
        print_rows(measured)
    report = run.out / "report.html"
    write_report([run.out], report)
    print(f"student   {run.student or 'not exported'}\nreport    {report}")
