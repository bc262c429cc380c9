"""What a run reads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from ldistill.common.ranks import say
from ldistill.data.held_out import held_out, parse_share
from ldistill.data.index import ShardIndex
from ldistill.data.order import Order
from ldistill.data.store import Reading
from ldistill.recipe import Recipe
from ldistill.sources import ALL, SourceWeights, known_sources, parse_extra, resolve_sources


@dataclass
class Data:
    """Shards, their order, the weights of their sources; what is held out to validate on."""

    index: ShardIndex
    order: Order
    weights: SourceWeights
    held: tuple[ShardIndex, Order] | None = None


def open_data(recipe: Recipe) -> Data:
    """What a recipe says. Raises ValueError or FileNotFoundError: no shards, unknown sources,
    nothing within the limit."""
    options = recipe.data
    if options.shards is None:
        raise ValueError(
            "no shards: make some with `ldistill shards build` and name them with --shards."
        )
    reading = Reading(options.shard_cache, options.shard_cache_gb, options.shard_reads)
    declared_here = parse_extra(options.extra_sources)
    everything = ShardIndex.load(options.shards, reading=reading, also=declared_here)
    declared = zip(everything.sources, everything.categories, strict=True)
    extra = {n: c for n, c in declared if n not in known_sources()} | declared_here
    found = names = everything.sources
    if options.sources != ALL:
        names = resolve_sources(options.sources, extra)
    if missing := [name for name in names if name not in found]:
        raise ValueError(
            f"{options.shards} has no finished shards of {', '.join(missing)} (--sources "
            f"{options.sources}); it has {', '.join(found)}. Train on what is there with --sources "
            f"{ALL}, or build the others with `ldistill shards build`."
        )
    index = ShardIndex.load(options.shards, names, reading)
    args, held, chosen = recipe.training, None, None
    order_of = partial(
        Order, limit=options.max_length, over_long=options.on_long, packing=options.packing
    )
    if options.validation:
        mask = held_out(index, parse_share(options.validation))
        other, chosen = ShardIndex.load(options.shards, names, reading), ~mask
        held = other, order_of(other, chosen=mask)
    elif options.eval_shards:
        other = _open_eval_shards(options.eval_shards, names, reading)
        held = other, order_of(other)
    order = order_of(
        index,
        seed=args.seed if args.data_seed is None else args.data_seed,
        shuffle_window=options.shuffle_window,
        mix=options.mix,
        chosen=chosen,
    )
    weights = SourceWeights.build(
        index.sources,
        distil=recipe.distil.distil,
        alpha=recipe.distil.alpha,
        temperature=recipe.distil.temperature,
        extra=extra,
    )
    for opened in (index, *(held or ())[:1]):
        opened.check_files()
    return Data(index, order, weights, held)


def _open_eval_shards(shards: str, names: list[str], reading: Reading) -> ShardIndex:
    """The run's sources among those of `--eval_shards`."""
    found = ShardIndex.load(shards, reading=reading, also=names).sources
    common = [name for name in names if name in found]
    if not common:
        raise ValueError(
            f"--eval_shards {shards} has {', '.join(found)}, none of the run's sources "
            f"({', '.join(names)})."
        )
    if left := sorted(set(found) - set(common)):
        say(f"validation leaves out {', '.join(left)}: this run does not train on them.")
    return ShardIndex.load(shards, common, reading)
