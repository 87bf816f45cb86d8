"""QA-LoRA, rank 64, on GPTQ in 4 bits and groups of 32: Gemma-2-9B on Alpaca.

qalora plan --config=configs/qalora_gemma2_9b.py --topology=h100
qalora train --config=configs/qalora_gemma2_9b.py --workdir=runs/qalora_gemma2_9b
Reads ./alpaca_data.json, or --config.data.train.path=FILE; calibrates on C4, or --config.calibration.text.path=FILE.

Devices and hours: unknown.  Expected: not yet run.
"""

from configs import relatives


def get_config():
  return relatives.finetune('gemma2_9b')
