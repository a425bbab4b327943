from esper_operator.main import main

main()
