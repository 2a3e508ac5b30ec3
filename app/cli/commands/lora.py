"""`menma lora`: tools on LoRA files."""

from __future__ import annotations

from app.cli.commands import lora_files, lora_ranks, lora_sums, lora_targets, lora_verify
from app.cli.options import command_app

app = command_app(help="Tools on LoRA files.")
app.command()(lora_files.inspect)
app.command()(lora_files.convert)
app.command()(lora_sums.merge)
app.command()(lora_sums.subtract)
app.command()(lora_sums.blend)
app.command()(lora_sums.ema)
app.command()(lora_ranks.resize)
app.command()(lora_ranks.extract)
app.command()(lora_targets.targets)
app.command()(lora_verify.verify)
