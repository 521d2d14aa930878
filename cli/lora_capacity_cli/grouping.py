"""Help that lists options by what they are about."""

import functools

import click

_SETTINGS = (
    *("adapters", "max_loras", "max_cpu_loras", "loaded_at_start", "max_lora_rank", "max_num_seqs"),
    *("max_num_batched_tokens", "gpu_memory_utilization", "max_model_len", "block_size", "target_modules"),
    *("lora_target_modules", "enable_prefix_caching", "watermark", "max_num_active_seqs"),
    *("long_prefill_token_threshold", "enforce_eager", "fully_sharded_loras", "enable_lora"),
)
_TITLES = {
    **dict.fromkeys(("workload", "space", "workloads"), "Workload"),
    **dict.fromkeys(("goodput", "attainment", "risk", "starvation_threshold"), "Bounds"),
    **dict.fromkeys(("calibration", "model", "gpu", "gpu_memory_gib", "host_memory_gib"), "Model and GPU"),
    **dict.fromkeys(("tensor_parallel_size", "pipeline_parallel_size", "quantization"), "Model and GPU"),
    **dict.fromkeys(("kv_cache_dtype", "vllm_version", "specialize_active_lora", "surrogate"), "Model and GPU"),
    **dict.fromkeys(_SETTINGS, "Server"),
    **dict.fromkeys(("goal", "within"), "Search"),
    **dict.fromkeys(("engine", "seed", "seeds", "warmup_s", "samples", "drain", "ray"), "Prediction"),
    **dict.fromkeys(("page", "emit", "figures", "figure", "output", "output_format"), "Output"),
}
"""Titles of the sections by parameter."""

_REST, _RECORDED = "Options", "Workload (recorded requests)"
_ORDER = (_REST, "Workload", "Model and GPU", "Server", "Bounds", "Search", "Prediction", _RECORDED, "Output")


def title_of(name: str) -> str:
    """Return the section that a parameter stands in."""
    return _RECORDED if name.startswith("trace_") else _TITLES.get(name, _REST)


class GroupedCommand(click.Command):
    """A command whose help lists its options in sections."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections that have any, those of this command alone first."""
        sections: dict[str, list[tuple[str, str]]] = {title: [] for title in _ORDER}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and isinstance(param, click.Option):
                sections["Output" if "--help" in param.opts else title_of(param.name or "")].append(record)
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


command = functools.partial(click.command, cls=GroupedCommand)
"""As `click.command`, with options in sections."""
