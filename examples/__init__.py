"""What is built on pfjax: the toy model, the study, the scores of creative writing."""
