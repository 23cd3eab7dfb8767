// Every part on its own: one that cannot be shown says so and leaves the others alone.

function start() {
  const parts = [
    ["paths", classNames.length > 0 && codebooks.length > 0, setUpChooser],
    ["paths", report.network && codebooks.length > 0, setUpNetwork],
    ["paths", report.samples && report.network, setUpSamples],
    ["early-decoding", report.early_decoding, setUpEarlyDecoding],
    ["removal", report.removal, setUpRemoval],
    ["classifiers", report.one_class, setUpClassifiers],
    ["early-exit", report.exit_curve, setUpExits],
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
