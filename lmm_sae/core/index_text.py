"""What an index knows of one latent or one sample, as text for a terminal."""

from lmm_sae.core.index import VIEWS, ImageExemplar, LatentIndex, TextExemplar

SHOWN = 20  # latents of a sample, strongest first


def latent(index: LatentIndex, latent: int) -> str:
  """How often it fires and on what, its postings' sizes and its exemplars."""
  stats, meta = index.stats, index.meta
  postings = {view: index.postings(latent, view) for view in VIEWS}

  def of(name: str):
    return stats[name][latent].item()

  kinds = sorted(n.removeprefix('fired_') for n in stats if n[:6] == 'fired_')
  flags = [flag for flag in ('dead', 'always_on') if of(flag)]
  lines = [
    f'latent {latent} of layer {meta.layer}, split {meta.split}'
    + ''.join(f', {flag}' for flag in flags),
    f'  fires on {of("rows_fired")} tokens of {of("samples_fired")} samples; '
    f'on {of("images_fired")} of {meta.images} images',
    '  tokens: ' + ', '.join(f'{kind} {of(f"fired_{kind}")}' for kind in kinds),
    f'  activation: peak {of("peak"):.4g}, mean {of("mean"):.4g}',
    '  quantiles: '
    + ', '.join(
      f'{level:g}: {value:.4g}'
      for level, value in zip(
        meta.levels, stats['quantiles'][latent].tolist(), strict=True
      )
    ),
    '  postings: '
    + ', '.join(f'{view} {len(p[0])}' for view, p in postings.items()),
  ]
  for title, images in (
    ('strongest images', index.exemplars(latent)),
    ('images by quantile', index.spread(latent)),
  ):
    lines += [f'  {title}:', *map(_image, images)] if images else []
  for title, texts in (
    ('strongest texts', index.texts(latent)),
    ('texts by quantile', index.text_spread(latent)),
  ):
    lines += [f'  {title}:', *map(_text, texts)] if texts else []
  return '\n'.join(lines)


def sample(index: LatentIndex, sample: int) -> str:
  """The latents that a sample's base view fires, strongest first."""
  latents, mean = index.sample(sample)
  first = mean.argsort(kind='stable')[::-1][:SHOWN]
  first_of = int(index.duplicate_S[sample])
  near = '' if first_of == sample else f', nearly the image of {first_of}'
  title = (
    f'sample {sample} of layer {index.meta.layer}, split {index.meta.split}'
    f'{near}: its base view fires {len(latents)} latents'
  )
  return '\n'.join(
    [title]
    + [f'  latent {latents[i]}: mean {float(mean[i]):.4g}' for i in first]
  )


def _image(found: ImageExemplar) -> str:
  at = '' if found.quantile != found.quantile else f' at {found.quantile:.2f}'
  lit, cells = int((found.heat_HW > 0).sum()), found.heat_HW.size
  return (
    f'    sample {found.sample}: mean {found.strength:.4g}{at}, '
    f'{lit} of {cells} patches'
  )


def _text(found: TextExemplar) -> str:
  at = '' if found.quantile != found.quantile else f' at {found.quantile:.2f}'
  words = [
    f'[{token}]' if i == found.at else token
    for i, token in enumerate(found.tokens)
  ]
  text = ''.join(words).replace('\n', ' ')
  return f'    sample {found.sample}: {found.strength:.4g}{at}: {text}'
