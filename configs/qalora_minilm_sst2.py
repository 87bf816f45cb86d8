"""QA-LoRA, rank 8, on MiniLM-L6 in 4 bits and groups of 32: SST-2 of GLUE.

qalora train --config=configs/qalora_minilm_sst2.py --workdir=runs/qalora_minilm_sst2
qalora evaluate --workdir=runs/qalora_minilm_sst2 --tasks=sst2 --config.evaluate.data=glue

Minutes on two cores: about 15.  Expected: see experiments/results/glue.md.
"""

from configs import minilm


def get_config():
  return minilm.finetune('sst2', 'qalora')
