// Shows the rows of the table of transforms that fit what is chosen above it.
function filter(form) {
  const rows = [...document.querySelectorAll("#choices tbody tr")]
  for (const row of rows)
    row.hidden = ![...new FormData(form)].every(([key, value]) => !value || row.dataset[key].split(" ").includes(value))
  form.querySelector("output").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length}`
}

const chooser = document.getElementById("chooser")
if (chooser) {
  chooser.addEventListener("change", () => filter(chooser))
  filter(chooser)
}
