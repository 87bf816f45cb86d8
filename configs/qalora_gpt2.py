"""QA-LoRA, rank 64, on GPTQ in 4 bits and groups of 32: GPT-2 on Alpaca.

qalora plan --config=configs/qalora_gpt2.py --topology=h100
qalora train --config=configs/qalora_gpt2.py --workdir=runs/qalora_gpt2
Reads ./alpaca_data.json, or --config.data.train.path=FILE; calibrates on C4, or --config.calibration.text.path=FILE.

Devices and hours: unknown.  Expected: not yet run.
"""

from configs import relatives


def get_config():
  config = relatives.finetune('gpt2')
  # It has no positions beyond 1024: prompts are shorter than the paper's, and so are the windows for calibration.
  config.data.update(max_prompt=1024 - 256 - 2, window=1024)
  config.calibration.length = 1024
  return config
