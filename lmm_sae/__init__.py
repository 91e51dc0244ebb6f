"""Opens up a large multimodal model and lets a larger one explain it.

capture   runs the subject once and stores its residual stream, token by token
train     fits a sparse autoencoder (SAE) to the stored rows
index     finds, for every latent, the images and tokens that fire it
evaluate  says how good the SAE is, by token kind
explain   shows a larger LMM the masked exemplars and asks what they share
score     grounds each explanation in the images again, beside baselines
steer     edits latents while the subject answers, beside controls
attribute finds which latents caused an answer, and checks by ablation
report    puts all of it on one page

Dimension key. Arrays of rank >= 1 end in their axes:
B images, T tokens of a sequence, N rows (tokens, mixed), D residual width,
M latents, L some of them, K active latents a row, E exemplars a latent,
P base-view tokens, S samples, C concepts, H W pixels, V vocabulary,
Q questions, R variants.
"""

__version__ = '0.1.0'
