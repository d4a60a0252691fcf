"""What a plan must be, written down a second time: slow, with plain sets, straight from the paper's description."""

from fdm_cli.plan import Plan


def paper_plan(scheme: str, length: int, window: int, step: int, given: int) -> list[list[list[int]]] | None:
    """The stages of one of the paper's schemes; None where the description does not say what to do."""
    stages: list[list[list[int]]] = []
    done = list(range(given))
    levels = int(scheme[-1]) if scheme.startswith("hierarchy") else 0
    if not given:
        first = spread(0, length - 1, window) if levels else list(range(min(window, length)))
        stages.append([[], first])
        done = list(first)
    origin = list(done)
    if levels:
        return hierarchy(stages, done, origin, length, window, step, levels, given)
    while len(done) < length:
        newest = sorted(done)[::-1]
        latent = [frame for frame in range(max(done) + 1, max(done) + 1 + step) if frame < length]
        observed = newest[: window - step]
        if scheme == "long-range":
            observed = newest[: (window - step) // 2]
            observed += [frame for frame in sorted(origin)[::-1] if frame not in observed]
            observed = observed[: window - step]
        stages.append([sorted(observed), latent])
        done += latent
    return stages


def hierarchy(stages, done, origin, length, window, step, levels, given):
    if step == 1:
        return None
    ratio = (length - len(origin)) / (step - 1)
    free = window - step
    if given and given < length:
        latent = sorted(set(spread(max(origin) + 1, length - 0.001, step)))
        observed = sorted({origin[i] for i in spread(0, max(origin) + 0.999, free)})
        stages.append([observed, latent])
        done += latent
    level, last = 1, max(done)
    while len(done) < length:
        spacing = int(ratio ** ((levels - level) / (levels - 1)))
        if level == 1 or not [frame for frame in range(last + spacing, length) if frame not in done]:
            level += 1
            if level > levels:
                return None
            last = min(frame for frame in range(length) if frame not in done) - 1
            continue
        if spacing == 0:
            return None
        latent = []
        frame = last + spacing
        while frame < length and len(latent) < step:
            if frame in done:
                frame += 1
            else:
                latent.append(frame)
                frame += spacing
        between = [frame for frame in range(latent[0], latent[-1]) if frame in done]
        if len(between) > free:
            return None
        after = [frame for frame in range(latent[-1], length) if frame in done][: (free - len(between)) // 2]
        rest = free - len(between) - len(after)
        before = [frame for frame in range(latent[0] - 1, -1, -1) if frame in done][:rest]
        stages.append([sorted(between + after + before), latent])
        done += latent
        last = latent[-1]
    return stages


def spread(first: float, last: float, count: int) -> list[int]:
    """`int` of linspace."""
    if count == 1:
        return [int(first)]
    places = [first + i * ((last - first) / (count - 1)) for i in range(count - 1)]
    return sorted({int(place) for place in [*places, last]}) if count else []


def check(plan: Plan) -> None:
    """Every invariant of a plan, and everything else that it says about itself."""
    given = {frame for start, stop in plan.given for frame in range(start, stop)}
    made_in = dict.fromkeys(given, -1)
    made_by = dict.fromkeys(given, -1)
    reach = 0
    for number, stage in enumerate(plan.stages):
        assert stage.latent
        assert list(stage.latent) == sorted(set(stage.latent))
        assert all(0 <= frame < plan.length and frame not in made_in for frame in stage.latent)
        assert stage.observed_count + len(stage.latent) <= plan.window
        if stage.observed is None:
            assert stage.choice is not None
            needed = {frame for frame, maker in made_by.items() if maker < stage.choice.among}
            assert set(stage.choice.always) <= needed
            assert len(stage.choice.always) < stage.observed_count < len(needed)
            positions = sorted(plan.positions(stage, sorted(needed)))
        else:
            needed = set(stage.observed)
            assert list(stage.observed) == sorted(needed)
            assert len(stage.observed) == stage.observed_count
            assert needed <= made_in.keys()
            positions = sorted(plan.positions(stage, stage.observed))
        assert stage.wave == 1 + max((made_in[frame] for frame in needed), default=-1)
        places = [*positions, *stage.latent]
        furthest = max(places) - min(places)
        if stage.choice is not None and plan.closed:  # what may be chosen is not looked through frame by frame
            assert furthest <= plan.length - 1
            furthest = plan.length - 1
        reach = max(reach, furthest)
        for frame in stage.latent:
            made_in[frame] = stage.wave
            made_by[frame] = number
    assert made_in.keys() == set(range(plan.length))
    assert plan.waves == 1 + max(made_in.values(), default=-1)
    assert plan.reach == reach
    waves = list(plan.by_wave())
    assert sorted(number for wave in waves for number in wave) == list(range(plan.calls))
    assert [{plan.stages[number].wave for number in wave} for wave in waves] == [{i} for i in range(plan.waves)]
    for frame in range(plan.length):
        assert plan.makers[frame] == made_by[frame]
