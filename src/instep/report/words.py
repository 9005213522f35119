"""The report in words: what was done, and what health found."""

from __future__ import annotations

from html import escape

from instep.report.read import RunRecord


def duration(seconds: float) -> str:
    """`45 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}\u00a0s"
    if whole < 3600:
        return f"{whole // 60}\u00a0min {whole % 60}\u00a0s"
    return f"{whole // 3600}\u00a0h {whole % 3600 // 60}\u00a0min"


def plural(n: int, word: str) -> str:
    return f"{n} {word}{'' if n == 1 else 's'}"


def what_was_done(run: RunRecord) -> str:
    """One paragraph (HTML) of what the run trained, from what, how, and how long it took."""
    if run.recipe is None:
        return f"<p>The recipe of <b>{escape(run.folder.name)}</b> is not recorded (recipe.json is missing).</p>"
    recipe, levels = run.recipe, run.recipe.get("levels") or []
    config = recipe.get("config") or {}
    stages = [f"{s.get('name')} ({plural(int(s.get('steps', 0)), 'iteration')})" for s in config.get("stages") or []]
    many = config.get("sampler") == "ode"
    guided = config.get("guidance") != 1 and all(stage.get("guided", True) for stage in config.get("stages") or [])
    evaluations = len(levels) * (2 if many and guided else 1)
    sentences = [
        f"<b>{escape(str(recipe.get('recipe')))}</b> "
        + (
            f"aligned <b>{escape(str(recipe.get('model')))}</b>, which stays a many-step model and here takes "
            if many
            else f"turned <b>{escape(str(recipe.get('model')))}</b> into a student that needs "
        )
        + f"<b>{plural(evaluations, 'network evaluation')}</b> for a sample"
        + (f" (noise levels {escape(', '.join(f'{level:g}' for level in levels))})." if levels else ".")
    ]
    if stages:
        sentences.append(f"{'Stages' if len(stages) > 1 else 'Stage'}: {escape(', then '.join(stages))}; seed {escape(str(recipe.get('seed')))}.")
    cpu, wall = run.total("cpu_s"), run.total("wall_s")
    if wall is not None and run.iterations:
        processor = f" ({duration(cpu)} of processor time)" if cpu is not None else ""
        sentences.append(f"Its {plural(run.iterations, 'logged iteration')} took {duration(wall)}{processor}.")
    if recipe.get("start_from"):
        sentences.append(f"It began with the student of {escape(str(recipe['start_from']).rsplit('/', 1)[-1])}.")
    return "<p>" + " ".join(sentences) + "</p>"


def health(run: RunRecord) -> str:
    """Findings of a run (HTML): each flag once, from when to when."""
    if run.health is None:
        return "<p class='none'>Health is not recorded (health.jsonl is missing).</p>" if not run.log else "<p class='fine'>No finding was raised.</p>"
    flags: dict[str, dict] = {}
    for finding in run.health:
        flag, level = str(finding.get("flag", "?")), str(finding.get("level", "warn"))
        if level == "ok":
            if flag in flags:
                flags[flag]["until"] = finding.get("step")
        else:
            level = level if level in ("warn", "alarm") else "warn"
            flags[flag] = {"level": level, "text": str(finding.get("text", "")), "from": finding.get("step"), "until": None}
    if not flags:
        return "<p class='fine'>No finding was raised.</p>"
    lines = []
    for flag, f in sorted(flags.items(), key=lambda item: (item[1]["until"] is not None, item[1]["level"])):
        when = f"from step {f['from']}, still open at the end" if f["until"] is None else f"step {f['from']} to {f['until']}, then cleared"
        badge = f["level"] if f["until"] is None else "cleared"
        item = f"<b>{escape(flag)}</b> {escape(f['text'])}<small>{escape(when)}</small>"
        lines.append(f"<li class='{badge}'><span class='badge'>{badge}</span><div>{item}</div></li>")
    return f"<ul class='health'>{''.join(lines)}</ul>"
