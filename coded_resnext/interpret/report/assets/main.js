// Every part on its own: one that cannot be shown says so and leaves the others alone.

function start() {
  const parts = [
    ["paths", codebooks.length > 0, setUpChooser],
    ["paths", codebooks.length > 0, setUpNetwork],
    ["paths", codebooks.length > 0 && results.samples, setUpSamples],
    ["early-decoding", results.early_decoding, setUpEarlyDecoding],
    ["removal", results.removal, setUpRemoval],
    ["classifiers", codebooks.length > 0 && results.one_class, setUpClassifiers],
    ["early-exit", results.early_exit, setUpExits],
    ["codebooks", codebooks.length > 0, setUpCodebooks],
    ["training", report.training_log, setUpTraining],
  ];
  for (const [id, there, setUp] of parts) {
    if (!there || !byId(id)) continue;
    try {
      setUp();
    } catch (error) {
      console.error(error);
      byId(id).append(html("p", { class: "absent", text: `This part cannot be shown: ${error.message}` }));
    }
  }
  document.documentElement.dataset.ready = "yes";
}

start();
