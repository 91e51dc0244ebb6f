"""Reads an export with Neuronpedia's own client, in that one's environment.

    benchmarks/.envs/neuronpedia/bin/python tests/peers/read_neuronpedia.py DIR

writes {'activations': n, 'explanations': n, 'upload': [features of a request]}.
What would be sent to the site's API is kept instead.
"""

import gzip
import json
import pathlib
import sys

from neuronpedia.np_activation import Activation
from neuronpedia.np_explanation import Explanation
from neuronpedia.np_feature import Feature
from neuronpedia.requests.feature_request import FeatureRequest


def lines(folder: pathlib.Path, table: str):
  """The rows of a table."""
  for path in sorted((folder / table).glob('batch-*.jsonl.gz')):
    with gzip.open(path, 'rt') as file:
      for line in file:
        row = json.loads(line)
        yield row | {'source': row['layer']}  # as the API names it


def main(folder: pathlib.Path) -> None:
  activations = [
    Activation.from_np_db_json(row) for row in lines(folder, 'activations')
  ]
  explanations = [
    Explanation.from_np_db_json(row) for row in lines(folder, 'explanations')
  ]
  features = [
    Feature(
      modelId=row['modelId'],
      source=row['layer'],
      index=int(row['index']),
      density=row['frac_nonzero'],
      activations=[a for a in activations if a.index == int(row['index'])],
      explanations=[e for e in explanations if e.index == int(row['index'])],
    )
    for row in lines(folder, 'features')
  ]
  sent = []
  request = FeatureRequest(api_key='none')
  request.send_request = lambda method, uri, json: sent.append((uri, json))
  request.upload_batch(features[0].modelId, features[0].source, features[:128])
  [(uri, body)] = sent
  assert uri == 'upload-batch'
  said = {
    'activations': len(activations),
    'explanations': len(explanations),
    'upload': body['features'],
  }
  sys.stdout.write(json.dumps(said))


if __name__ == '__main__':
  main(pathlib.Path(sys.argv[1]))
