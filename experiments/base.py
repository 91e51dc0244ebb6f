"""Every field of a run, with its unit and its reason. Values only.

A config of your own is a file with `get_config()` that calls this one and
changes fields; on the command line, `--config.section.field=value` does.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  """The fields and their plain defaults."""
  return ConfigDict(
    {
      'seed': 0,  # every random choice of the run follows from it
      'acts': '',  # a store shared with other runs; '' is WORKDIR/acts
      'lmm': {
        'path': 'small',  # small, base (packaged), or a llava-hf model folder
        'layers': (2,),  # decoder layers hooked, 0-based: their OUTPUT
        'device': 'cpu',  # where the subject runs: cpu, cuda, auto (sharded)
        'dtype': 'float32',  # float32, bfloat16, float16; int8: its weights
        'threads': 0,  # CPU threads of the Torch process; 0: one a core
      },
      'data': {
        'source': 'scenes',  # scenes, llava, images, hub
        'path': '',  # llava: JSON or JSONL; images: folder; hub:
        # owner/name[@revision] of the hub, or a parquet file or folder
        'subset': '',  # hub: configuration of the data set; '': its only one
        'split': 'train',  # hub: split of the data set
        'stream': False,  # hub: read rows over the network, keep no file
        'template': 'chat',  # chat: the model's; raw: turns alone, a line each
        'image_root': '',  # folder that rows' images lie in; '': the file's own
        'limit': 0,  # samples of the source that are used; 0: all
        'seed': 0,  # of halves, scenes, the tokens kept and their mixing
        'heldout': 0.25,  # share of the samples kept for halves A and B
        'train': 2400,  # scenes: samples of the train split
        'half': 500,  # scenes: samples of each of the halves A and B
      },
      'capture': {
        'batch': 8,  # sequences a forward
        'group': 128,  # samples that are mixed, and committed together
        'mix': True,  # mix the rows of a group; halves A and B keep their order
        'keep': ('all', 'bos'),  # tokens stored of train: kind, or kind:share
        'keep_halves': ('all', 'bos'),  # the same for halves A and B
        'store': 'bfloat16',  # of the rows; int8: with a scale a row
        'max_tokens': 4096,  # a longer sample is rejected, with its reason
        'shard_rows': 32768,  # rows a zarr3 shard; a group owns whole shards
        'chunk_rows': 256,  # rows a chunk: what one read touches
        'workers': 'local',  # who makes the groups: local, ray
        'processes': 0,  # of them; 0: local: one a core, ray: all that fit
        'share': '',  # i/n: this command makes groups i, i + n, ...; '': all
        'ray_address': '',  # of a running cluster; '': RAY_ADDRESS, or one here
        'ray_gpus': 0.0,  # that a Ray worker takes
        'ray_cpus': 1.0,  # that a Ray worker takes
      },
      'sae': {
        'latents': 1024,  # M
        'k': 8,  # latents that may fire on one row; on average, but for topk
        'dead_after': 200_000,  # rows without firing that make a latent dead
        'aux': 0,  # dead latents that answer for a row in AuxK; 0: width / 2
        'activation': 'topk',  # topk, batchtopk, jumprelu
        'row_k': 0,  # most on one row where k is an average; 0: 4 k
        'prefixes': (),  # Matryoshka: the first so many are an SAE too
        'bandwidth': 0.01,  # jumprelu: of its gradient, in rms lengths of a row
      },
      'train': {
        'steps': 1500,  # optimiser steps
        'rows': 2048,  # rows a step, over all devices
        'lr': 0.0,  # peak learning rate; 0: 2e-4 / sqrt(latents / 2**14)
        'warmup': 100,  # optimiser steps of linear warm-up
        'decay_from': 0.5,  # share of the steps after which lr falls to 0
        'clip': 1.0,  # global norm of the gradient
        'accumulate': 1,  # pieces of a step whose gradients are added up
        'max_skipped': 10,  # steps with NaN or Inf before the run stops
        'auxk': 1 / 32,  # weight of the loss that wakes dead latents
        'multi_topk': 0.0,  # weight of the FVU at 4k; paper: 1/8, optional
        'sparsity': 1.0,  # jumprelu: weight of (l0 / k - 1)**2
        'k_from': 0,  # k of the first step, which falls to sae.k; 0: sae.k
        'k_steps': 0,  # optimiser steps within which it does
        'compute': 'float32',  # of products: float32, bfloat16; sums: float32
        'init': '',  # SAE folder to go on from, any layout; may hold {layer}
        'kinds': ('all',),  # token kinds trained on; BOS is never in `all`
        'normalise': True,  # train on rows of unit spread; exports are raw
        'backend': 'auto',  # kernels: auto, native, cpu, gpu, tpu, reference
        'devices': 1,  # that share the work of a step; 0: all
        'latent_shards': 1,  # of them, how many share the latents of an SAE
        'save_every': 250,  # steps between checkpoints
        'keep': 2,  # checkpoints kept: the last so many
        'keep_best': 1,  # and those of the lowest FVU since the one before
        'block_rows': 256,  # rows a read; blocks of many samples are mixed
        'pool_blocks': 256,  # blocks mixed with one another before batching
        'data_shares': 8,  # independent parts of a batch: 1 a host or more
      },
      'hosts': {
        'cluster': 'auto',  # auto (JAX_NUM_PROCESSES or SLURM), tpu, none
        'join_s': 300,  # within which every process of a run must be there
        'silent_s': 100,  # after which a process that is not heard is lost
      },
      'doctor': {
        'checksums': True,  # read the store's shards; False: sizes alone
        'drop': False,  # drop damaged groups, which capture makes again
      },
      'convert': {
        'source': '',  # SAE folder or hub repository to import; '': export
        'layer': -1,  # layer that it reads; -1: the one of lmm.layers
        'pickles': False,  # whether ae.pt is fetched from the hub, too
        'upload': '',  # hub repository that the export is sent to; '': none
        'to': '',  # neuronpedia: write that; '': the SAE's two layouts
        'name': 'res-lmm-sae',  # of Neuronpedia's source set
        'split': 'b',  # half whose exemplars Neuronpedia shows
      },
      'inspect': {
        'path': '',  # checkpoint, SAE or store that is shown; '': the workdir
        'stats': False,  # read the arrays, too: norms, dead, neighbours
        'against': '',  # another checkpoint or SAE: what differs from it
        'json': False,  # print one JSON object instead of a table
      },
      'evaluate': {
        'split': 'b',  # acts split that is measured
        'rows': 200_000,  # rows read at most; 0: all
        'samples': 64,  # read again with the SAE in the loop, by the server
        'kinds': ('all',),  # of tokens whose residual it replaces there
        'batch': 8,  # samples of one request
        'bootstrap': 1000,  # resamples of a confidence interval
        'others': (),  # further SAE folders, compared; may hold {layer}
      },
      'index': {
        'splits': ('a', 'b'),  # acts splits that are indexed
        'rows': 4096,  # rows encoded at a time
        'exemplars': 10,  # E: kept a latent, by mean over the base view
        'text_exemplars': 8,  # text contexts kept a latent
        'context': 12,  # tokens shown on either side of a text exemplar
        'threshold': 1e-5,  # activation above which a patch is active (paper)
        'always_on': 0.5,  # share of samples above which a latent is always on
        'spread': 10,  # exemplars kept a latent, drawn over its quantiles
        'seed': 0,  # of that draw
        'memory_mb': 2048,  # that a process may hold beside the SAE
        'processes': 0,  # that make parts; 0: one a core
        'share': '',  # i/n: this command makes parts i, i + n, ...; '': all
        'dictionaries': (),  # indexed beside the SAE: untrained, neurons
        'latent': -1,  # print what is known of this latent, and end
        'sample': -1,  # print what this sample fires, and end
      },
      'explain': {
        'base_url': '',  # OpenAI-compatible server; '': one is started
        'model': '',  # its model; '': the packaged base LMM
        'others': ('small',),  # further packaged explainers, without base_url
        'api_key': '',  # of base_url; '': the environment's OPENAI_API_KEY
        'latents': (),  # latents to explain; (): all alive
        'limit': 0,  # at most so many; 0: no limit
        'exemplars': 5,  # images in one message (paper: 5)
        'refine_url': '',  # server that shortens answers; '': base_url
        'refine_model': '',  # its model; '': the explainer
        'refine_key': '',  # of refine_url; '': OPENAI_API_KEY
        'refine_prices': (),  # as price_in, price_out, of that model
        'category_url': '',  # server that names categories; '': base_url
        'category_model': '',  # its model; '': the explainer
        'category_key': '',  # of category_url; '': OPENAI_API_KEY
        'category_prices': (),  # as price_in, price_out, of that model
        'dictionaries': (),  # explained beside the SAE: untrained, neurons
        'dictionary_limit': 64,  # latents of each of them, drawn by seed
        'price_in': 0.0,  # of 10^6 tokens of prompts, in any currency
        'price_out': 0.0,  # of 10^6 tokens of answers
        'split': 'b',  # half whose exemplars are shown
        'pixels': 64,  # longer side of an image that is sent; 0: as it is
        'mask': 'exact',  # mask style: exact (nearest) or paper (bilinear)
        'threshold': 0.25,  # of the latent's peak, above which a patch is lit;
        # mask paper lights what index.threshold says
        'max_tokens': 64,  # of an answer
        'concurrency': 4,  # requests under way at once
        'retries': 4,  # of a request that failed, with back-off
        'timeout_s': 120.0,  # of one attempt
      },
      'score': {
        'images': 5,  # exemplars scored a latent
        'random': 5,  # random images a latent, for the baseline
        'box_threshold': 0.3,  # of Grounding DINO (paper)
        'grounder': 'clip',  # clip (packaged), dino (DINO + SAM), clipseg
        'grounder_path': '',  # model folder(s), comma separated; '': packaged
        'clip_path': '',  # CLIP folder; '': the packaged one
        'judge_url': '',  # OpenAI-compatible server that judges; '': none does
        'judge_model': '',  # its model; `all`, without a URL: an explainer of
        # those that it starts
        'judge_key': '',  # of judge_url; '': the environment's OPENAI_API_KEY
        'second_url': '',  # of a second judge; '': judge_url
        'second_model': '',  # its model; '': there is no second judge
        'second_key': '',  # of second_url; '': OPENAI_API_KEY
        'judged': 64,  # latents a judge is asked about, drawn by seed; 0: all
        'cases': 10,  # questions a latent and task: half of them true
        'fuzz': 'fuzz',  # is it lit? fuzz: asked; visible: it says what is lit
        'concurrency': 4,  # requests of a judge under way at once
        'bootstrap': 1000,  # resamples of a confidence interval
      },
      'label': {
        'rater': '',  # who rates in the browser: ann,bob; '': measure agreement
        'host': '127.0.0.1',  # where the page is served
        'port': 0,  # 0: a free one, printed
        'latents': 32,  # shown to every rater, the same ones
        'images': 5,  # a latent
      },
      'steer': {
        'latents': (),  # latents to steer; (): best per concept, or explained
        'candidates': 2,  # latents a concept tried on half A, by F1 on A
        'doses': (1.0, 2.0, 3.0, 4.0, 6.0, 8.0),  # in units of the peak
        'where': 'image',  # tokens that are clamped
        'when': 'prompt',  # prompt (paper), generated, both
        'keep_error': False,  # False: the reconstruction replaces (paper)
        'cases_a': 8,  # images a concept on half A, where the dose is chosen
        'cases_b': 40,  # images a concept on half B, where figures are taken
        'prompts': ('What is your feeling right now?',),  # without truth
        'max_new_tokens': 12,  # of an answer
        'batch': 64,  # rows of one request
      },
      'attribute': {
        'samples': 60,  # answers of half B that are attributed
        'points': 4,  # where gradients are taken: 1: at the residual alone
        'top': 12,  # latents re-checked by exact ablation
        'mistakes': 30,  # wrong answers that are mended by rule
        'max_new_tokens': 12,  # of an answer
        'batch': 64,  # rows of one request
      },
      'report': {
        'title': '',  # '': made from the subject's name
        'latents': 0,  # pages at most; 0: every latent that fires
        'image_px': 128,  # longer side of an exemplar's picture
      },
      'plan': {
        'samples': 0,  # samples of the source; data.limit and scenes are known
        'tokens': 0,  # rows a sample, on average; 0: capture.max_tokens
        'width': 0,  # D; 0: from the config.json of lmm.path
        'trial': 24,  # samples at least that capture --dry_run measures by
        'devices': 1,  # that share the SAE and its rows
        'tflops': 0.0,  # TFLOP/s one device sustains; 0: no hours are told
        'topology': '',  # chips to plan for: v5p:4x4x4, v5e:4x4, h100:8, gpu:8
        'meshes': 'one',  # that are compiled: one (the run's), all that divide
        'gpu_memory': 0.0,  # GB of a chip of topology gpu:N
        'gpu_bandwidth': 0.0,  # GB/s of its memory
        'gpu_tflops': 0.0,  # TFLOP/s of its bfloat16 products, data sheet
        'gpu_link': 0.0,  # GB/s to other chips, both ways; 0: not counted
        'out': '',  # JSON file that the plan is written to; '': none
      },
      'server': {
        'url': '',  # of a running `lmm-sae serve`; '': one is started
        'host': '127.0.0.1',  # another address needs server.token
        'port': 0,  # 0: a free one, printed
        'token': '',  # bearer token of the server
        'max_mb': 256,  # of a request's body
        'queue': 16,  # requests that may wait; one more is answered 503
        'timeout_s': 600.0,  # of one request, for the clients
      },
    }
  )
