"""The audit: may we use this encoder, what does securing it cost, what must we watch.

What a stage measured becomes a decision, and a page for who decides, without JAX and in a second:
`decision.decide` holds it to a policy and to a company's answers, `pages.write` leaves the pages.
"""
