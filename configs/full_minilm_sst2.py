"""All weights of MiniLM-L6: SST-2 of GLUE.

qalora train --config=configs/full_minilm_sst2.py --workdir=runs/full_minilm_sst2
qalora evaluate --workdir=runs/full_minilm_sst2 --tasks=sst2 --config.evaluate.data=glue

Minutes on two cores: about 15.  Expected: see experiments/results/glue.md.
"""

from configs import minilm


def get_config():
  return minilm.finetune('sst2', 'full')
