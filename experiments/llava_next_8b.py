"""The paper: LLaVA-NeXT-LLaMA3-8B, layer 24, 131,072 latents, k = 256.

arXiv 2411.14982, sections 3 and 4. What differs from it stands beside the
field. Needs GPUs for the subject, GPUs or TPUs for the SAE, and an explainer
behind any OpenAI-compatible URL:

lmm-sae plan --config=experiments/llava_next_8b.py \\
  --config.plan.topology=v5p:4x4x4
lmm-sae STAGE --config=experiments/llava_next_8b.py --workdir=DIR \\
  --config.lmm.path=MODEL_FOLDER --config.data.path=llava_next.json \\
  --config.data.image_root=IMAGES --config.explain.base_url=http://HOST:8000/v1
"""

from ml_collections import ConfigDict

from experiments import base


def get_config() -> ConfigDict:
  """For hours and disk ask `plan`: nobody has run this on the whole data."""
  config = base.get_config()
  config.seed = 42

  config.lmm.path = 'llava-hf/llama3-llava-next-8b-hf'
  config.lmm.layers = (24,)
  config.lmm.device = 'auto'
  config.lmm.dtype = 'bfloat16'  # the paper's code: float16

  config.data.source = 'llava'
  config.data.path = ''  # LLaVA-NeXT-Data as JSON
  config.data.heldout = 0.05  # halves A and B; the paper reads 46,684 images
  config.data.seed = 42

  config.capture.batch = 8
  config.capture.group = 256  # mixed in memory: 5 GB of rows, 18 shards
  config.capture.max_tokens = 4096  # 5 views of 576, newlines, the talk

  config.sae.latents = 2**17
  config.sae.k = 256
  config.sae.dead_after = 10_000_000

  config.train.steps = 24_000
  config.train.rows = 32 * 2300  # the paper's 32 samples a step, mixed here
  config.train.lr = 7.07e-5  # 2e-4 / sqrt(2**17 / 2**14)
  config.train.warmup = 1000
  config.train.decay_from = 1000 / 24_000  # linear from the end of warm-up
  config.train.auxk = 1 / 32  # the paper's text; its command leaves it off
  config.train.save_every = 500
  config.train.compute = 'bfloat16'  # of products; sums are float32
  config.train.devices = 0  # all; on 64 chips of a v5p a mesh of 8 x 8, which
  config.train.latent_shards = 8  # also holds 2**20 latents; 1 GPU: set it to 1
  config.train.data_shares = 64  # of 1150 rows; a v5p of 64 chips has 16 hosts
  config.train.pool_blocks = 512  # of as many samples: 1 GB

  config.evaluate.rows = 2_000_000
  config.evaluate.batch = 4  # others' rows of 4 samples are 150 MB of a body

  config.index.rows = 16_384
  config.index.exemplars = 10

  config.explain.model = 'lmms-lab/llava-onevision-qwen2-72b-ov-chat'
  config.explain.others = ()
  config.explain.limit = 5000
  config.explain.pixels = 336
  config.explain.mask = 'paper'
  config.explain.threshold = 0.0  # the paper lights every patch above 1e-5
  config.explain.concurrency = 32

  config.score.grounder = 'dino'
  config.score.grounder_path = (
    'IDEA-Research/grounding-dino-base,facebook/sam-vit-huge'
  )
  config.score.clip_path = 'openai/clip-vit-base-patch32'
  config.score.random = 10  # the paper: 10 for IoU, 30 for CLIP

  config.steer.where = 'all'
  config.steer.prompts = (
    'What is your feeling right now?',
    'Tell me a story about Alice and Bob',
  )
  config.steer.max_new_tokens = 256
  config.steer.batch = 4

  config.report.image_px = 336

  config.plan.samples = 779_000
  config.plan.tokens = 2300
  config.plan.width = 4096
  config.plan.devices = 8
  return config
