"""The tables that a Neuronpedia imports, as far as an export fills them.

Written off apps/webapp/prisma/schema.prisma of hijohnnylin/neuronpedia on
GitHub (commit 008d5040ab97abd5c44d92d190b30034ad7a6e97), and off what its
importer does with a file (apps/webapp/app/api/admin/import/route.ts and
apps/webapp/lib/db/import.ts): rows of the first four are created as they are,
so a field that the table lacks is an error; of the others the columns are those
of a file's first line, and a line that lacks one has NULL there.

`COLUMNS[table][column]` is (type, whether it must be there).
"""

import re

TEXT, INT, NUMBER, FLAG = 'text', 'int', 'number', 'flag'
TEXTS, INTS, NUMBERS = 'texts', 'ints', 'numbers'
MUST = 'must'  # the schema has neither `?` nor a default
MAY = 'may'  # it has a default
NULL = 'null'  # it has `?`

_ABOUT = {'creatorId': (TEXT, MUST), 'visibility': (TEXT, MAY)}
_LATENT = {
  'modelId': (TEXT, MUST),
  'layer': (TEXT, MUST),
  'index': (TEXT, MUST),
}

COLUMNS = {
  'release': _ABOUT
  | {
    'name': (TEXT, MUST),
    'description': (TEXT, MUST),
    'descriptionShort': (TEXT, NULL),
    'urls': (TEXTS, MAY),
    'creatorName': (TEXT, MUST),
    'creatorNameShort': (TEXT, NULL),
  },
  'model': _ABOUT
  | {
    'id': (TEXT, MUST),
    'displayName': (TEXT, MAY),
    'displayNameShort': (TEXT, MAY),
    'dimension': (INT, NULL),
    'instruct': (FLAG, MAY),
    'layers': (INT, MUST),
    'neuronsPerLayer': (INT, MUST),
    'owner': (TEXT, MUST),
  },
  'sourceset': _ABOUT
  | {
    'modelId': (TEXT, MUST),
    'name': (TEXT, MUST),
    'hasDashboards': (FLAG, MAY),
    'allowInferenceSearch': (FLAG, MAY),
    'description': (TEXT, MUST),
    'type': (TEXT, MAY),
    'creatorName': (TEXT, MUST),
    'urls': (TEXTS, MAY),
    'releaseName': (TEXT, NULL),
  },
  'source': _ABOUT
  | {
    'id': (TEXT, MUST),
    'modelId': (TEXT, MUST),
    'hasDashboards': (FLAG, MAY),
    'inferenceEnabled': (FLAG, MAY),
    'setName': (TEXT, MUST),
    'num_prompts': (INT, NULL),
    'notes': (TEXT, NULL),
  },
  'features': _LATENT
  | {
    'sourceSetName': (TEXT, NULL),
    'creatorId': (TEXT, NULL),
    'maxActApprox': (NUMBER, NULL),
    'hasVector': (FLAG, MAY),
    'vector': (NUMBERS, MAY),
    'vectorLabel': (TEXT, NULL),
    'vectorDefaultSteerStrength': (NUMBER, NULL),
    'hookName': (TEXT, NULL),
    'topkCosSimIndices': (INTS, MAY),
    'topkCosSimValues': (NUMBERS, MAY),
    'neuron_alignment_indices': (INTS, MAY),
    'neuron_alignment_values': (NUMBERS, MAY),
    'neuron_alignment_l1': (NUMBERS, MAY),
    'correlated_neurons_indices': (INTS, MAY),
    'correlated_neurons_pearson': (NUMBERS, MAY),
    'correlated_neurons_l1': (NUMBERS, MAY),
    'neg_str': (TEXTS, MAY),
    'neg_values': (NUMBERS, MAY),
    'pos_str': (TEXTS, MAY),
    'pos_values': (NUMBERS, MAY),
    'frac_nonzero': (NUMBER, MAY),
    'freq_hist_data_bar_heights': (NUMBERS, MAY),
    'freq_hist_data_bar_values': (NUMBERS, MAY),
    'logits_hist_data_bar_heights': (NUMBERS, MAY),
    'logits_hist_data_bar_values': (NUMBERS, MAY),
    'decoder_weights_dist': (NUMBERS, MAY),
  },
  'activations': _LATENT
  | {
    'id': (TEXT, MUST),
    'tokens': (TEXTS, MUST),
    'dataIndex': (TEXT, NULL),
    'dataSource': (TEXT, NULL),
    'maxValue': (NUMBER, MUST),
    'maxValueTokenIndex': (INT, MUST),
    'minValue': (NUMBER, MUST),
    'values': (NUMBERS, MUST),
    'dfaValues': (NUMBERS, MAY),
    'dfaTargetIndex': (INT, NULL),
    'dfaMaxValue': (NUMBER, NULL),
    'creatorId': (TEXT, MUST),
    'lossValues': (NUMBERS, MAY),
    'logitContributions': (TEXT, NULL),
    'binMin': (NUMBER, NULL),
    'binMax': (NUMBER, NULL),
    'binContains': (NUMBER, NULL),
    'qualifyingTokenIndex': (INT, NULL),
  },
  'explanations': _LATENT
  | {
    'id': (TEXT, MUST),
    'description': (TEXT, MUST),
    'authorId': (TEXT, MUST),
    'notes': (TEXT, NULL),
    'embedding': (NUMBERS, NULL),
    'umap_x': (NUMBER, NULL),
    'umap_y': (NUMBER, NULL),
    'umap_cluster': (INT, NULL),
    'umap_log_feature_sparsity': (NUMBER, NULL),
    'typeName': (TEXT, NULL),
    'explanationModelName': (TEXT, NULL),
  },
}


def wrong(table: str, row: dict) -> list[str]:
  """What is wrong with a row of a table; [] where nothing is."""
  columns = COLUMNS[table]
  found = [f'{name}: no such column' for name in row if name not in columns]
  for name, (kind, must) in columns.items():
    if name not in row:
      if must == MUST:
        found.append(f'{name}: missing')
    elif row[name] is None:
      if must != NULL:
        found.append(f'{name}: null')
    elif not _is(kind, row[name]):
      found.append(f'{name}: {row[name]!r} is no {kind}')
  seen = ('PUBLIC', 'UNLISTED', 'PRIVATE')
  if 'visibility' in columns and row.get('visibility') not in seen:
    found.append('visibility')
  if table == 'model' and not re.fullmatch(r'[a-zA-Z0-9-_]{1,128}', row['id']):
    found.append(f'id: {row["id"]!r}')  # @zod.custom of the schema
  return found


def _is(kind: str, value) -> bool:
  if kind in (TEXTS, INTS, NUMBERS):
    one = {TEXTS: TEXT, INTS: INT, NUMBERS: NUMBER}[kind]
    return isinstance(value, list) and all(_is(one, each) for each in value)
  return {
    TEXT: lambda: isinstance(value, str) and '\0' not in value,
    INT: lambda: type(value) is int,
    NUMBER: lambda: type(value) in (int, float),
    FLAG: lambda: type(value) is bool,
  }[kind]()
