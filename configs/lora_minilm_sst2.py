"""LoRA, rank 8, on MiniLM-L6: SST-2 of GLUE.

qalora train --config=configs/lora_minilm_sst2.py --workdir=runs/lora_minilm_sst2
qalora evaluate --workdir=runs/lora_minilm_sst2 --tasks=sst2 --config.evaluate.data=glue

Minutes on two cores: about 15.  Expected: see experiments/results/glue.md.
"""

from configs import minilm


def get_config():
  return minilm.finetune('sst2', 'lora')
