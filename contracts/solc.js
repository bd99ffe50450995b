#!/usr/bin/env node
// The command line that forge expects of solc, over the pinned npm compiler: --version, and --standard-json on stdin. Offline.
'use strict'
const fs = require('node:fs')
const path = require('node:path')
const solc = require('solc')

const args = process.argv.slice(2)

/** Directories in which an import is looked for, in order. */
function roots() {
  const found = [process.cwd()]
  args.forEach((arg, i) => {
    if (arg === '--base-path') found.unshift(args[i + 1])
    if (arg === '--include-path') found.push(args[i + 1])
  })
  return found
}

function load(name) {
  for (const root of roots()) {
    const file = path.resolve(root, name)
    if (fs.existsSync(file)) return { contents: fs.readFileSync(file, 'utf8') }
  }
  return { error: `${name} not found in ${roots().join(', ')}; run make contracts` }
}

if (args.includes('--version')) {
  const version = solc.version().replace(/\.Emscripten.*$/, '')
  process.stdout.write(`solc, the solidity compiler commandline interface\nVersion: ${version}.Linux.g++\n`)
} else if (args.includes('--standard-json')) {
  process.stdout.write(solc.compile(fs.readFileSync(0, 'utf8'), { import: load }))
} else {
  process.stderr.write(`only --version and --standard-json are known here, got: ${args.join(' ')}\n`)
  process.exit(1)
}
