"""Secure aggregation: the server learns the sum of the sites' updates, but no single update.

After Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning"
(https://eprint.iacr.org/2017/281), with one masking exchange a round as in Flamingo (Ma et al.
2023, https://eprint.iacr.org/2023/486): pair masks come from a secret of the run, so that nothing
has to be agreed on before a round. Above `graph.COMPLETE` sites, each masks with some of the others
(Bell et al. 2020, https://eprint.iacr.org/2020/704). NumPy and ``cryptography`` only; nothing here
knows Flower or models.
"""
